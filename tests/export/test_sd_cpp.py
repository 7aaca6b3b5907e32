"""Single files in stable-diffusion.cpp: it counts a pruned model's blocks and draws what the folder's model draws.

Needs `stable_diffusion_cpp`, which `make test-tools` builds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ppcl_ds.export.gguf_file import write_gguf
from ppcl_ds.export.model_folder import write_file
from ppcl_ds.export.names import load_names, to_file
from ppcl_ds.teacher.files import held
from tests.export.test_comfyui import IDS, packed, unpacked
from tests.families.teachers import shake

pytestmark = pytest.mark.tools

SIDE, SEED = 64, 3
"""Pixels of an image, of which a token has 16; and what its noise is drawn from."""
DRAWN = ("FluxTransformer2DModel",)
NARROW = dict(
    num_layers=3, num_single_layers=5, num_attention_heads=1, joint_attention_dim=4096, guidance_embeds=True
)  # heads of 128 channels, and prompts as long as T5's, are what stable-diffusion.cpp takes for granted


def clip(pooled: Tensor) -> dict[str, Tensor]:
    """A CLIP-L that says `pooled` of every prompt: FLUX.1 cannot be asked for an image without one."""
    with torch.device("meta"):
        empty = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    state = {
        f"text_model.{name.removeprefix('text_model.')}": torch.zeros(tensor.shape, dtype=torch.float16)
        for name, tensor in empty.state_dict().items()
    }
    return state | {"text_model.final_layer_norm.bias": pooled}


def drawn(model: nn.Module, vae: Any, pooled: Tensor) -> np.ndarray[Any, Any]:
    """The image of one Euler step from pure noise, (SIDE, SIDE, 3), by diffusers' models; T5's prompt is zero."""
    noise = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        velocity = model(
            hidden_states=packed(noise),
            encoder_hidden_states=torch.zeros(1, 256, 4096),
            pooled_projections=pooled[None],
            timestep=torch.ones(1),
            img_ids=IDS,
            txt_ids=torch.zeros(256, 3),
            guidance=torch.tensor([3.5]),
            return_dict=False,
        )[0]
        latents = noise - unpacked(velocity)
        image = vae.decode(latents, return_dict=False)[0]
    return np.asarray((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255)


def theirs(folder: Path, file: Path) -> np.ndarray[Any, Any]:
    """The same by stable-diffusion.cpp, which knows the noise of PyTorch on CPUs."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        diffusion_model_path=str(file),
        clip_l_path=str(folder / "clip_l.safetensors"),
        taesd_path=str(folder / "taef1.safetensors"),
        rng_type="cpu",
        sampler_rng_type="cpu",
        n_threads=1,
        verbose=False,
    )
    [image] = model.generate_image(
        "", width=SIDE, height=SIDE, cfg_scale=1.0, guidance=3.5, sample_method="euler", sample_steps=1, seed=SEED
    )
    return np.asarray(image.convert("RGB"), dtype=np.float32)


@dataclass(frozen=True)
class Flux:
    """A narrow FLUX.1 of a few blocks, and in a folder what stable-diffusion.cpp needs beside it."""

    folder: Path
    model: Any
    vae: Any
    pooled: Tensor


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    pooled = torch.randn(768)
    model = diffusers.FluxTransformer2DModel(**NARROW).eval()
    vae: Any = diffusers.AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(64,) * 4).eval()
    last = vae.decoder.layers[-1]  # with random weights it is far out of what an image can show
    with torch.no_grad():
        shake(model)
        for parameter in model.parameters():
            parameter.mul_(2)  # so that every block is seen in the image
        shown = vae.decoder(torch.randn(1, 16, SIDE // 8, SIDE // 8)) / 2 + 0.5
        last.weight.mul_(0.25 / shown.std())
        last.bias.copy_(0.5 - (shown.mean() - last.bias) * 0.25 / shown.std())
    save_file(clip(pooled), folder / "clip_l.safetensors")
    save_file(dict(vae.state_dict()), folder / "taef1.safetensors")
    return Flux(folder, model, vae, pooled)


@pytest.mark.parametrize("kind", ["safetensors", "F16", "Q8_0"])
def test_flux_draws_what_the_folder_draws(flux: Flux, kind: str) -> None:
    """In levels of 255: nothing but rounding, and what quantising costs; without its last block it is another image."""
    sources = to_file(load_names()[DRAWN[0]], flux.model.config, held(flux.model.state_dict()))
    file = flux.folder / f"flux-{kind}.{'safetensors' if kind == 'safetensors' else 'gguf'}"
    if kind == "safetensors":
        write_file(sources, file)
    else:
        write_gguf("flux", sources, file, kind)
    expected = drawn(flux.model, flux.vae, flux.pooled)
    shorter = copy.deepcopy(flux.model)
    del shorter.single_transformer_blocks[-1]
    assert np.abs(drawn(shorter, flux.vae, flux.pooled) - expected).mean() > 2
    assert np.abs(theirs(flux.folder, file) - expected).mean() < (1 if kind == "Q8_0" else 0.5)
