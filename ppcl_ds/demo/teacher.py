"""The demo's teacher: a small pipeline around a stock Qwen-Image transformer, trained from scratch on the digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_folder
from ppcl_ds.console import track
from ppcl_ds.data.images import as_rgb, decode
from ppcl_ds.data.index import Index
from ppcl_ds.data.shards import Shards
from ppcl_ds.demo.digits import digit_captions, real_digits
from ppcl_ds.demo.pipeline import DigitsPipeline, PixelVae, WordTable
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import DemoTeacher, Noise
from ppcl_ds.teacher.noising import draw_places

_WARMUP_STEPS = 50
"""Enough for AdamW's second moments; zero-initialised modulation tolerates a short warm-up."""


def train_teacher(recipe: Recipe) -> None:
    """Train the demo's teacher and save it as the pipeline folder `recipe.teacher.path`.

    It is trained on the raw shards, or on all digits where those hold captions alone.

    The folder appears whole or not at all; one that is there already is kept. Runs in one process, on a GPU if there
    is one, and leaves torch's global random state as it was.

    Raises:
        UserError: the recipe has no `demo` section, or its `config` has a key that the transformer does not know.
    """
    if recipe.demo is None:
        raise UserError("key 'demo' is missing from the recipe: it says how large the demo's teacher is")
    if recipe.teacher.path.exists():
        return
    pipeline = fresh_pipeline(recipe.demo, recipe.seed)
    pipeline.transformer.to(launch.device())
    if recipe.data.sizes:  # which is what those who bring captions alone do not have
        pixels, labels = real_digits()
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        captions = digit_captions(labels)
    else:
        images, captions = read_images(recipe.data.shards / "raw")
    fit(pipeline, images, captions, recipe.noise, recipe.demo, torch.Generator().manual_seed(recipe.seed))
    with atomic_folder(recipe.teacher.path) as folder:
        pipeline.save_pretrained(folder)


def fresh_pipeline(demo: DemoTeacher, seed: int) -> DigitsPipeline:
    """A pipeline whose new transformer's blocks are the identity and whose output is 0 (adaLN-zero, as in DiT)."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw their weights from the global state only
        torch.manual_seed(seed)
        try:
            model = QwenImageTransformer2DModel(**demo.config)
        except TypeError as fault:
            raise UserError(f"recipe key demo.config: {fault}") from None
    zeroed = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        zeroed += [block.img_mod[1], block.txt_mod[1]]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return DigitsPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=PixelVae(model.config.in_channels // 4),
        text_encoder=WordTable(model.config.joint_attention_dim),
        transformer=model,
    )


def read_images(raw: Path) -> tuple[Tensor, list[str]]:
    """All training images of raw shards, (N, 3, H, W) float32 in [-1, 1], and their captions."""
    index = Index.read(raw / "index.json", "ppcl-data shard")
    shards = Shards([entry for entry in index.shards if entry.name.startswith("train-")], raw)
    samples = [shards.read(number)[1] for number in range(len(shards))]
    pixels = np.stack([np.asarray(as_rgb(decode(parts["png"]))) for parts in samples])  # (N, H, W, 3) uint8
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [parts["txt"].decode() for parts in samples]


def fit(
    pipeline: DigitsPipeline,
    images: Tensor,
    captions: list[str],
    noise: Noise,
    demo: DemoTeacher,
    generator: torch.Generator,
) -> None:
    """Flow matching: the model learns the velocity `noise - data`; it ends with the average of its weights.

    Args:
        pipeline: its transformer, float32, is trained in place.
        images: (N, 3, H, W) in [-1, 1].
        noise: which noise levels, and how many captions are dropped.
        demo: steps, batch size, learning rate and averaging.
        generator: CPU generator for all that is drawn.
    """
    model = pipeline.transformer
    latents = pipeline.vae.encode(images).latent_dist.mode()  # (N, C, H, W)
    height, width = latents.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]] * demo.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARMUP_STEPS, demo.steps)
    # Its decay grows from 0.1, so that a short run does not remember the initial weights.
    average = EMAModel(model.parameters(), decay=demo.ema, foreach=True)
    for step in track(range(demo.steps), "training the teacher", demo.steps):
        start = step * demo.batch_size % len(latents)
        if start < demo.batch_size:  # an epoch begins
            order = torch.randperm(len(latents), generator=generator)
        chosen = order[torch.arange(start, start + demo.batch_size) % len(latents)]
        dropped = torch.rand(demo.batch_size, generator=generator) < noise.caption_dropout
        words = ["" if drop else captions[row] for row, drop in zip(chosen.tolist(), dropped.tolist(), strict=True)]
        embeds, mask = pipeline.encode_prompt(words, torch.device("cpu"))
        sigmas = 1 - draw_places(noise, demo.batch_size, generator)
        data = latents[chosen]
        fresh = torch.randn(data.shape, generator=generator)
        noisy = torch.lerp(data, fresh, sigmas.view(-1, 1, 1, 1))
        inputs = [pipeline.pack_latents(each).to(model.device) for each in (noisy, fresh - data)]
        text = embeds.to(model.device), None if mask is None else mask.to(model.device)
        predicted = pipeline.velocity("cond", inputs[0], sigmas.to(model.device) * 1000, shapes, *text)
        F.mse_loss(predicted, inputs[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(model.parameters())
    average.copy_to(model.parameters())
    model.eval()
