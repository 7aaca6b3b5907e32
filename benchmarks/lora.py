"""What a depth unit should be given of a LoRA: nothing, or what the LoRA has for the block that the unit started from?

    python -m benchmarks.lora [--recipe FILE] [--json FILE] [--quick]

LoRAs are trained on the demo's teacher, each to draw the digits in a manner of its own, and carried to every variant by
`ppcl lora remap`. Each figure is the mean squared difference of velocities from the teacher with the LoRA, on noised
images of this manner. Needs the finished demo (`make demo`), whose folder is only read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.table import JsonFile, Quick, Row, row, show
from ppcl_ds.console import track
from ppcl_ds.demo.teacher import read_images
from ppcl_ds.export.load import load_model, load_pipeline
from ppcl_ds.export.lora import STRATEGIES, remap
from ppcl_ds.recipe import load_recipe

MANNERS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda latents: -latents,
    "mirrored": lambda latents: latents.flip(-1),
    "faint": lambda latents: (latents - 1) / 2,
}
"""What the LoRAs draw digits like, latents (N, 1, 8, 8) -> the same: ink for paper, left for right, half as dark."""
RANK, BATCH, RATE = 8, 64, 3e-3
MODULES = r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|img_mlp\.net\.(0\.proj|2))"


class Noised:
    """Batches of noised images of a manner, with their captions."""

    def __init__(self, pipeline: Any, latents: Tensor, captions: list[str], seed: int) -> None:
        self.pipeline, self.latents, self.captions = pipeline, latents, captions
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[list[Any], Tensor]:
        """Arguments of the pipeline's `velocity`, and the true velocity, (B, S, C)."""
        chosen = torch.randint(len(self.latents), (BATCH,), generator=self.generator)
        embeds, mask = self.pipeline.encode_prompt([self.captions[n] for n in chosen], torch.device("cpu"))
        sigmas = torch.rand(BATCH, generator=self.generator)
        data = self.latents[chosen]
        fresh = torch.randn(data.shape, generator=self.generator)
        noisy = torch.lerp(data, fresh, sigmas.view(-1, 1, 1, 1))
        height, width = data.shape[-2:]
        shapes = [[(1, height // 2, width // 2)]] * BATCH
        return [self.pipeline.pack_latents(noisy), sigmas * 1000, shapes, embeds, mask], self.pipeline.pack_latents(
            fresh - data
        )


def trained(pipeline: Any, noised: Noised, steps: int) -> dict[str, Tensor]:
    """A LoRA of the pipeline's transformer, which keeps it; as diffusers' pipelines save it."""
    model = pipeline.transformer.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, init_lora_weights="gaussian"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for _ in track(range(steps), "training a LoRA", steps):
        arguments, true = noised.batch()
        F.mse_loss(pipeline.velocity("cond", *arguments), true).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {f"transformer.{name}": t.contiguous() for name, t in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def velocities(pipeline: Any, batches: list[list[Any]]) -> Tensor:
    """(N, S, C)."""
    return torch.cat([pipeline.velocity("cond", *arguments) for arguments in batches])


def main(
    recipe: Annotated[Path, typer.Option(help="Of the demo's run.")] = Path("recipes/digits.yaml"),
    json: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Measure both strategies of `ppcl lora remap`, and no LoRA."""
    loaded = load_recipe(recipe)
    images, captions = read_images(loaded.data.shards / "raw")
    rows: list[Row] = []
    for manner, change in MANNERS.items():
        pipeline: Any = load_pipeline(loaded.teacher.path, torch.float32)
        latents = change(pipeline.vae.encode(images).latent_dist.mode())
        test = Noised(pipeline, latents, captions, 1)
        batches = [test.batch()[0] for _ in range(2 if quick else 8)]
        lora = trained(pipeline, Noised(pipeline, latents, captions, 0), 100 if quick else 400)
        wanted = velocities(pipeline, batches)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            save_file(lora, file)
            for variant in ("large", "medium", "small"):
                found = {}
                for strategy in ("none", *STRATEGIES):
                    pipeline.transformer = load_model(loaded.pruned(variant), torch.float32)
                    if strategy != "none":
                        out = Path(folder) / f"{variant}-{strategy}.safetensors"
                        remap(file, loaded.plan_file, variant, loaded.teacher.path, out, strategy)
                        pipeline.transformer.load_lora_adapter(load_file(out), prefix="transformer")
                    found[strategy] = float((velocities(pipeline, batches) - wanted).square().mean())
                note = f"{found['none']:.4g} without a LoRA"
                rows.append(row(f"{manner}, {variant}: nearest / drop", found["nearest"], found["drop"], "MSE", note))
    show("LoRAs of the teacher on variants", rows, json)


if __name__ == "__main__":
    typer.run(main)
