"""Single files in ComfyUI: its own code knows them at their published sizes, and computes what the folder's model does.

Needs a checkout of ComfyUI, which `make test-tools` fetches: `COMFYUI=/path/to/ComfyUI pytest -m tools`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppcl_ds.export.model_folder import write_file
from ppcl_ds.export.names import from_file, load_names, to_file
from ppcl_ds.export.scaled import FORMATS, scaled
from ppcl_ds.teacher.files import held
from tests.families.teachers import shake

pytestmark = pytest.mark.tools

TEXT, IMAGE = (
    torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(1, 5, 16), (1, 4, 8, 8)])
)
POOLED = torch.linspace(-1, 1, 8)[None]
SIGMA = torch.tensor([0.4])
IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
HEAD = dict(attention_head_dim=16, num_attention_heads=2)


def packed(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpacked(tokens: Tensor) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=2, q=2)


def with_axis(ids: Tensor) -> Tensor:
    return torch.cat([ids, torch.zeros(len(ids), 1)], 1)


@dataclass(frozen=True)
class Case:
    """A narrow model of a family: what diffusers and what ComfyUI are given."""

    class_name: str
    known_as: str
    """The class of ComfyUI's `supported_models` for files of published size."""
    published: dict[str, Any]
    """What its default configuration in diffusers is not, and the lengths after pruning."""
    depths: dict[str, int]
    """Key of ComfyUI's configuration -> what it must count."""
    config: dict[str, Any]
    narrow: dict[str, Any]
    """What ComfyUI takes for granted, or from the width, of a model as narrow as this."""
    ours: dict[str, Any]
    theirs: dict[str, Any]
    back: Callable[[Tensor], Tensor] = field(default=lambda output: output)
    """diffusers' output as ComfyUI lays it out."""


WIDE = IMAGE.repeat(1, 4, 1, 1) * torch.linspace(0.1, 1, 16).view(16, 1, 1)
LAYERS = torch.randn(1, 5, 3, 32, generator=torch.Generator().manual_seed(4))
CLIP = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
CASES = {
    "qwen": Case(
        "QwenImageTransformer2DModel",
        "QwenImage",
        dict(num_layers=41),
        dict(num_layers=41),
        HEAD | dict(in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)),
        HEAD | dict(joint_attention_dim=16, axes_dims_rope=(4, 6, 6), out_channels=4),
        dict(
            hidden_states=packed(IMAGE),
            encoder_hidden_states=TEXT,
            encoder_hidden_states_mask=torch.ones(1, 5).bool(),
            timestep=SIGMA,
            img_shapes=[[(1, 4, 4)]],
        ),
        dict(x=IMAGE[:, :, None], timestep=SIGMA, context=TEXT),
        lambda output: unpacked(output)[:, :, None],
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        "Flux",
        dict(num_layers=11, num_single_layers=21, guidance_embeds=True),
        dict(depth=11, depth_single_blocks=21),
        HEAD
        | dict(in_channels=16, num_layers=2, num_single_layers=3, joint_attention_dim=16, pooled_projection_dim=8)
        | dict(axes_dims_rope=(4, 6, 6), guidance_embeds=True),
        dict(axes_dim=[4, 6, 6], num_heads=2, out_channels=4),
        dict(
            hidden_states=packed(IMAGE),
            encoder_hidden_states=TEXT,
            pooled_projections=POOLED,
            timestep=SIGMA,
            img_ids=IDS,
            txt_ids=torch.zeros(5, 3),
            guidance=torch.tensor([3.5]),
        ),
        dict(x=IMAGE, timestep=SIGMA, context=TEXT, y=POOLED, guidance=torch.tensor([3.5])),
        unpacked,
    ),
    "flux2": Case(
        "Flux2Transformer2DModel",
        "Flux2",
        dict(num_layers=5, num_single_layers=30),
        dict(depth=5, depth_single_blocks=30),
        HEAD
        | dict(in_channels=4, num_layers=2, num_single_layers=3, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4)),
        dict(axes_dim=[4, 4, 4, 4], num_heads=2, out_channels=4),
        dict(
            hidden_states=rearrange(IMAGE, "b c h w -> b (h w) c"),
            encoder_hidden_states=TEXT,
            timestep=SIGMA,
            img_ids=with_axis(torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))),
            txt_ids=torch.cat([torch.zeros(5, 3), torch.arange(5.0)[:, None]], 1),
            guidance=torch.tensor([3.5]),
        ),
        dict(x=IMAGE, timestep=SIGMA, context=TEXT, guidance=torch.tensor([3.5])),
        lambda output: rearrange(output, "b (h w) c -> b c h w", h=8),
    ),
    "z_image": Case(
        "ZImageTransformer2DModel",
        "ZImage",
        dict(n_layers=23),
        dict(n_layers=23),
        dict(in_channels=4, dim=1024, n_layers=2, n_refiner_layers=1, n_heads=64, n_kv_heads=64, cap_feat_dim=16)
        | dict(axes_dims=[4, 6, 6], axes_lens=[64, 32, 32]),
        dict(
            in_channels=4,
            n_heads=64,
            n_kv_heads=64,
            n_refiner_layers=1,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 32, 32],
            rope_theta=256.0,
        )
        | dict(ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)
        | dict(multiple_of=1),
        dict(x=[IMAGE[0][:, None]], t=1 - SIGMA, cap_feats=[TEXT[0]]),
        dict(x=IMAGE, timesteps=SIGMA, context=TEXT, num_tokens=torch.tensor(5)),
        lambda output: -output[:, :, 0],
    ),
    "wan": Case(
        "WanTransformer3DModel",
        "WAN21_T2V",
        dict(num_layers=29),
        dict(num_layers=29),
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
        | dict(
            text_dim=16, freq_dim=256, ffn_dim=32, num_layers=3, qk_norm="rms_norm_across_heads", rope_max_seq_len=32
        ),
        dict(num_heads=2, text_dim=16),
        dict(hidden_states=CLIP, encoder_hidden_states=TEXT, timestep=1000 * SIGMA),
        dict(x=CLIP, timestep=1000 * SIGMA, context=TEXT),
    ),
    "sd35": Case(
        "SD3Transformer2DModel",
        "SD3",
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, dual_attention_layers=tuple(range(13)))
        | dict(qk_norm="rms_norm", pos_embed_max_size=384),
        dict(depth=24),
        dict(attention_head_dim=64, num_attention_heads=3, num_layers=3, joint_attention_dim=16)
        | dict(sample_size=8, patch_size=2, in_channels=16, out_channels=16, caption_projection_dim=192)
        | dict(pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=(0, 1))
        | dict(qk_norm="rms_norm"),
        {},
        dict(hidden_states=WIDE, encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=1000 * SIGMA),
        dict(x=WIDE, timesteps=1000 * SIGMA, context=TEXT, y=POOLED),
    ),
    "hunyuan_video15": Case(
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideo15",
        dict(num_layers=40),
        dict(depth=40),
        HEAD
        | dict(in_channels=4, out_channels=4, num_layers=3, num_refiner_layers=2, mlp_ratio=4.0, patch_size=1)
        | dict(text_embed_dim=16, text_embed_2_dim=1472, image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16),
        dict(num_heads=2, axes_dim=[4, 6, 6]),
        dict(
            hidden_states=CLIP,
            encoder_hidden_states=TEXT,
            timestep=1000 * SIGMA,
            encoder_attention_mask=torch.ones(1, 5),
            encoder_hidden_states_2=torch.ones(1, 2, 1472) / 9,
            encoder_attention_mask_2=torch.ones(1, 2),
            image_embeds=torch.ones(1, 3, 12) / 7,
        ),
        dict(
            x=CLIP,
            timestep=1000 * SIGMA,
            context=TEXT,
            txt_byt5=torch.ones(1, 2, 1472) / 9,
            clip_fea=torch.ones(1, 3, 12) / 7,
        ),
    ),
    "krea2": Case(
        "Krea2Transformer2DModel",
        "Krea2",
        dict(num_layers=20),
        dict(layers=20),
        HEAD
        | dict(in_channels=16, num_layers=3, num_key_value_heads=1, intermediate_size=128, timestep_embed_dim=256)
        | dict(text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2)
        | dict(text_intermediate_size=128, num_layerwise_text_blocks=2, num_refiner_text_blocks=2)
        | dict(axes_dims_rope=(4, 6, 6)),
        dict(heads=2, kvheads=1, txtheads=2, txtkvheads=2),
        dict(
            hidden_states=packed(IMAGE),
            encoder_hidden_states=LAYERS,
            timestep=SIGMA,
            position_ids=torch.cat([torch.zeros(5, 3), IDS]),
        ),
        dict(
            x=IMAGE,
            timesteps=SIGMA,
            context=LAYERS.flatten(2),
        ),
        unpacked,
    ),
    "ltx": Case(
        "LTXVideoTransformer3DModel",
        "LTXV",
        dict(num_layers=20),
        dict(num_layers=20),
        dict(in_channels=4, out_channels=4, num_attention_heads=32, attention_head_dim=2, cross_attention_dim=64)
        | dict(caption_channels=16, num_layers=3),
        dict(in_channels=4, caption_channels=16),
        dict(
            hidden_states=rearrange(CLIP, "b c f h w -> b (f h w) c"),
            encoder_hidden_states=TEXT,
            encoder_attention_mask=torch.ones(1, 5).long(),
            timestep=1000 * SIGMA,
            num_frames=2,
            height=4,
            width=4,
            rope_interpolation_scale=(8 / 25, 32, 32),
        ),
        dict(x=CLIP, timestep=SIGMA, context=TEXT, attention_mask=torch.ones(1, 5).long()),
        lambda output: rearrange(output, "b (f h w) c -> b c f h w", f=2, h=4),
    ),
}


WIDER = {name: CASES[name].config | dict(attention_head_dim=32) for name in ("flux", "wan")}
WIDER["flux"] |= dict(axes_dims_rope=(8, 12, 12))
"""Wide enough for matrices that are quantised."""


def run_comfyui(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What ComfyUI says to each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("comfyui.py")
    done = subprocess.run(
        [sys.executable, program, os.environ["COMFYUI"], folder / "jobs.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ComfyUI says to every case, in one process: name -> (seen, drawn), and diffusers' own output."""
    folder = tmp_path_factory.mktemp("comfyui")
    jobs: list[dict[str, Any]] = []
    own: dict[str, Tensor] = {}
    for name, case in CASES.items():
        family = getattr(diffusers, case.class_name)
        with torch.device("meta"):
            large = family(**case.published)
        names = load_names()[case.class_name]
        shapes = {key: list(each.shape) for key, each in to_file(names, large.config, held(large.state_dict())).items()}
        (folder / f"{name}.json").write_text(json.dumps(shapes))
        torch.manual_seed(0)
        model = family(**case.config).eval()
        shake(model)
        file = {key: each.load() for key, each in to_file(names, model.config, held(model.state_dict())).items()}
        save_file({key: each.contiguous() for key, each in file.items()}, folder / f"{name}.safetensors")
        save_file({key: each.clone() for key, each in case.theirs.items()}, folder / f"{name}-inputs.safetensors")
        with torch.no_grad():
            output = model(**case.ours, return_dict=False)[0]
        own[name] = case.back(torch.stack(list(output)) if isinstance(output, list) else output)
        jobs.append({"shapes": f"{folder / name}.json"})
        jobs.append(
            {
                "file": f"{folder / name}.safetensors",
                "inputs": f"{folder / name}-inputs.safetensors",
                "output": f"{folder / name}-output.safetensors",
                "narrow": case.narrow,
            }
        )
    said = run_comfyui(jobs, folder)
    return {
        name: (seen, drawn, own[name], folder / f"{name}-output.safetensors")
        for name, seen, drawn in zip(CASES, said[::2], said[1::2], strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_comfyui_knows_the_published_size_and_counts_its_blocks(name: str, answers: dict[str, Any]) -> None:
    seen = answers[name][0]
    assert "fault" not in seen, seen
    assert seen["class"] == CASES[name].known_as
    assert seen["missing"] == seen["unknown"] == seen["shapes"] == []
    assert {key: seen["config"][key] for key in CASES[name].depths} == CASES[name].depths


@pytest.mark.parametrize("name", CASES)
def test_comfyui_computes_what_the_folder_does(name: str, answers: dict[str, Any]) -> None:
    _, drawn, own, output = answers[name]
    assert drawn == {}
    torch.testing.assert_close(load_file(output)["output"], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_comfyui_computes_what_quantised_weights_say(kind: str, tmp_path: Path) -> None:
    """The reference multiplies the stored weights by their scales, and runs in diffusers."""
    names = ("flux", "wan")
    jobs: list[dict[str, Any]] = []
    expected: dict[str, Tensor] = {}
    for name in names:
        case = CASES[name]
        torch.manual_seed(0)
        model = getattr(diffusers, case.class_name)(**WIDER[name]).eval()
        shake(model)
        table = load_names()[case.class_name]
        sources, metadata = scaled(to_file(table, model.config, held(model.state_dict())), kind)
        write_file(sources, tmp_path / f"{name}.safetensors", metadata)
        file = load_file(tmp_path / f"{name}.safetensors")
        scales = {key.removesuffix("_scale"): file.pop(key) for key in list(file) if key.endswith(".weight_scale")}
        assert len(scales) > 20
        plain = {key: tensor.float() * scales.get(key, 1.0) for key, tensor in file.items()}
        back = from_file(table, model.state_dict(), held(plain))
        model.load_state_dict({key: source.load() for key, source in back.items()})
        with torch.no_grad():
            expected[name] = case.back(model(**case.ours, return_dict=False)[0])
        inputs, output = tmp_path / f"{name}-inputs.safetensors", tmp_path / f"{name}-output.safetensors"
        save_file({key: each.clone() for key, each in case.theirs.items()}, inputs)
        narrow = case.narrow | ({"num_heads": 2} if name == "wan" else {"axes_dim": [8, 12, 12]})
        jobs.append({"file": f"{tmp_path / name}.safetensors", "inputs": f"{inputs}", "output": f"{output}"})
        jobs[-1]["narrow"] = narrow
    assert run_comfyui(jobs, tmp_path) == [{}, {}]
    for name in names:
        found = load_file(tmp_path / f"{name}-output.safetensors")["output"]
        assert (found - expected[name]).norm() < 0.05 * expected[name].norm()
