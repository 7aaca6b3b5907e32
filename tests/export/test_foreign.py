"""Single files that others published: fewer blocks, by the names of the first release, made here by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.export.foreign import import_file
from tests.calls import answer, random_arguments
from tests.conftest import TEACHERS, command
from tests.pipelines import make_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    make_pipeline("flux", folder)
    return folder


def published(base: Path, path: Path, prefix: str = "") -> Any:
    """A FLUX with three double and two single blocks as its first release names them; the model that it is."""
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(**TEACHERS["flux"][1] | {"num_layers": 3, "num_single_layers": 2}).eval()
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    around = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    for kind in ("weight", "bias"):
        theirs |= {f"{new}.{kind}": ours[f"{old}.{kind}"] for new, old in around.items()}
        scale, shift = ours[f"norm_out.linear.{kind}"].chunk(2)
        theirs[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for k in range(3):
            old, new = f"transformer_blocks.{k}", f"double_blocks.{k}"
            for side, ours_side in (
                ("img", ("to_q", "to_k", "to_v")),
                ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                theirs[f"{new}.{side}_attn.qkv.{kind}"] = torch.cat([ours[f"{old}.attn.{e}.{kind}"] for e in ours_side])
            for theirs_name, our_name in {
                "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
            }.items():  # fmt: skip
                theirs[f"{new}.{theirs_name}.{kind}"] = ours[f"{old}.{our_name}.{kind}"]
        for k in range(2):
            old, new = f"single_transformer_blocks.{k}", f"single_blocks.{k}"
            parts = [ours[f"{old}.{e}.{kind}"] for e in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            theirs[f"{new}.linear1.{kind}"] = torch.cat(parts)
            theirs[f"{new}.linear2.{kind}"] = ours[f"{old}.proj_out.{kind}"]
            theirs[f"{new}.modulation.lin.{kind}"] = ours[f"{old}.norm.linear.{kind}"]
    for k in range(3):
        for side, added in (("img", ""), ("txt", "added_")):
            for which, letter in (("query", "q"), ("key", "k")):
                scale = ours[f"transformer_blocks.{k}.attn.norm_{added}{letter}.weight"]
                theirs[f"double_blocks.{k}.{side}_attn.norm.{which}_norm.scale"] = scale
    for k in range(2):
        for which, letter in (("query", "q"), ("key", "k")):
            theirs[f"single_blocks.{k}.norm.{which}_norm.scale"] = ours[
                f"single_transformer_blocks.{k}.attn.norm_{letter}.weight"
            ]
    save_file({prefix + name: tensor.contiguous() for name, tensor in theirs.items()}, path)
    return model


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_community_file_of_fewer_blocks_becomes_a_pipeline(base: Path, tmp_path: Path, prefix: str) -> None:
    model = published(base, tmp_path / "mini.safetensors", prefix)
    command("import", tmp_path / "mini.safetensors", "--base", base, "--out", tmp_path / "mini")
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "mini" / "transformer")
    assert (loaded.config.num_layers, loaded.config.num_single_layers) == (3, 2)
    arguments = random_arguments("FluxTransformer2DModel")
    torch.testing.assert_close(answer(loaded, arguments), answer(model, arguments), rtol=0, atol=0)
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mini").transformer.config.num_layers == 3


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(path: Path) -> None:
    torch.save({"img_in.weight": torch.ones(1)}, path)


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 30) + b"{")


def gap(path: Path) -> None:
    save_file({name: each for name, each in load_file(path).items() if not name.startswith("double_blocks.1.")}, path)


def more_blocks(path: Path) -> None:
    tensors = load_file(path)
    for k in range(3, 5):
        tensors |= {
            n.replace("blocks.2.", f"blocks.{k}."): t for n, t in tensors.items() if n.startswith("double_blocks.2.")
        }
    save_file({name: each.clone() for name, each in tensors.items()}, path)


def of_another_model(path: Path) -> None:
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, path)


def wider(path: Path) -> None:
    save_file(load_file(path) | {"img_in.weight": torch.ones(64, 4)}, path)


def scaled(path: Path) -> None:
    save_file(load_file(path) | {"double_blocks.0.img_mlp.0.weight_scale": torch.ones(())}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "no readable safetensors file"),
        (pickled, "no readable safetensors file"),
        (huge_header, "no readable safetensors file"),
        (gap, "of its transformer_blocks, number 1 is missing; is it of another model"),
        (more_blocks, "it has 5 transformer_blocks, more than the 4 of the base"),
        (of_another_model, "is missing; is it of another model"),
        (wider, r"'img_in.weight' has shape \[64, 4\] in place of \[32, 4\]"),
        (scaled, "is quantised"),
    ],
)
def test_a_file_that_cannot_be_imported_ends_in_one_line(
    damage: Callable[[Path], None], words: str, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mini.safetensors"
    published(base, path)
    damage(path)
    with pytest.raises(UserError, match=words) as fault:
        import_file(path, base, tmp_path / "out", 10**9)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_a_single_file_needs_its_base(base: Path, tmp_path: Path) -> None:
    published(base, tmp_path / "mini.safetensors")
    printed = command("import", tmp_path / "mini.safetensors", "--out", tmp_path / "out", code=2)
    assert "a single file needs --base" in printed
