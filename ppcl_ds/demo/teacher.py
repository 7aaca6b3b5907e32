"""The demo's teacher: a small pipeline around a stock Qwen-Image transformer, trained from scratch on a testbed."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_folder, atomic_write
from ppcl_ds.console import progress
from ppcl_ds.data.images import decode
from ppcl_ds.data.index import Index
from ppcl_ds.data.shards import Shards
from ppcl_ds.demo.pipeline import DigitsPipeline
from ppcl_ds.demo.testbeds import TESTBEDS, as_tensor, read_samples
from ppcl_ds.errors import UserError, brief
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import DemoTeacher, Noise
from ppcl_ds.teacher.noising import draw_places

_WARMUP_STEPS = 50
"""Enough for AdamW's second moments; zero-initialised modulation tolerates a short warm-up."""

_ENCODED_AT_ONCE = 64
"""Captions."""

_SAVED_EVERY = 60.0
"""Seconds between two writings of a training's state."""


def train_teacher(recipe: Recipe) -> None:
    """Train the demo's teacher and save it as the pipeline folder `recipe.teacher.path`.

    It is trained on the raw shards, or on all pictures of the testbed where those hold captions alone.

    The folder appears whole or not at all; one that is there already is kept. A training that was stopped goes on from
    where it was a minute before at most. Runs in one process, on a GPU if there is one, and leaves torch's global
    random state as it was.

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
        images, captions = read_samples(TESTBEDS[recipe.demo.data])
    else:
        images, captions = read_images(recipe.data.shards / "raw")
    state = recipe.run / "teacher-training.pt"
    fit(pipeline, images, captions, recipe.noise, recipe.demo, torch.Generator().manual_seed(recipe.seed), state)
    with atomic_folder(recipe.teacher.path) as folder:
        pipeline.save_pretrained(folder)
    state.unlink(missing_ok=True)


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
    testbed = TESTBEDS[demo.data]
    scheduler = FlowMatchEulerDiscreteScheduler()
    return testbed.pipeline(scheduler=scheduler, transformer=model, **testbed.parts(model.config))


def read_images(raw: Path) -> tuple[Tensor, list[str]]:
    """All training images of raw shards, (N, 3, H, W) float32 in [-1, 1], and their captions."""
    index = Index.read(raw / "index.json", "ppcl-data shard")
    shards = Shards([entry for entry in index.shards if entry.name.startswith("train-")], raw)
    samples = [shards.read(number)[1] for number in range(len(shards))]
    return as_tensor([decode(parts["png"]) for parts in samples]), [parts["txt"].decode() for parts in samples]


def fit(
    pipeline: DigitsPipeline,
    images: Tensor,
    captions: list[str],
    noise: Noise,
    demo: DemoTeacher,
    generator: torch.Generator,
    state: Path | None = None,
) -> None:
    """Flow matching: the model learns the velocity `noise - data`; it ends with the average of its weights.

    Args:
        pipeline: its transformer, float32, is trained in place.
        images: (N, 3, H, W) in [-1, 1].
        noise: which noise levels, and how many captions are dropped.
        demo: steps, batch size, learning rate and averaging.
        generator: CPU generator for all that is drawn.
        state: file that all of the training's state is kept in, every minute; if it is there, the training goes on.
    """
    model = pipeline.transformer
    latents = pipeline.vae.encode(images).latent_dist.mode()  # (N, C, H, W)
    height, width = latents.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]] * demo.batch_size
    texts = _encoded(pipeline, captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARMUP_STEPS, demo.steps)
    # Its decay grows from 0.1, so that a short run does not remember the initial weights.
    average = EMAModel(model.parameters(), decay=demo.ema, foreach=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    done, order = _restore(state, demo, parts, generator) if state and state.exists() else (0, torch.empty(0))
    written = time.monotonic()
    with progress("training the teacher", demo.steps, done) as advance:
        for step in range(done, demo.steps):
            start = step * demo.batch_size % len(latents)
            if start < demo.batch_size:  # an epoch begins
                order = torch.randperm(len(latents), generator=generator)
            chosen = order[torch.arange(start, start + demo.batch_size) % len(latents)]
            dropped = torch.rand(demo.batch_size, generator=generator) < noise.caption_dropout
            words = ["" if drop else captions[row] for row, drop in zip(chosen.tolist(), dropped.tolist(), strict=True)]
            embeds = pad_sequence([texts[caption] for caption in words], batch_first=True)
            lengths = torch.tensor([len(texts[caption]) for caption in words])
            mask = torch.arange(embeds.shape[1]) < lengths[:, None]
            sigmas = 1 - draw_places(noise, demo.batch_size, generator)
            data = latents[chosen]
            fresh = torch.randn(data.shape, generator=generator)
            noisy = torch.lerp(data, fresh, sigmas.view(-1, 1, 1, 1))
            inputs = [pipeline.pack_latents(each).to(model.device) for each in (noisy, fresh - data)]
            text = embeds.to(model.device), None if mask.all() else mask.to(model.device)
            predicted = pipeline.velocity("cond", inputs[0], sigmas.to(model.device) * 1000, shapes, *text)
            loss = F.mse_loss(predicted, inputs[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.step(model.parameters())
            advance(1, f"loss {float(loss.detach()):.3f}")
            if state and time.monotonic() - written > _SAVED_EVERY:
                _save(state, demo, parts, generator, step + 1, order)
                written = time.monotonic()
    average.copy_to(model.parameters())
    model.eval()


def _encoded(pipeline: DigitsPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Every caption that is there, and the empty one, as embeddings (S, E); each is encoded once."""
    every = list(dict.fromkeys(["", *captions]))
    found: dict[str, Tensor] = {}
    for start in range(0, len(every), _ENCODED_AT_ONCE):
        texts = every[start : start + _ENCODED_AT_ONCE]
        embeds, mask = pipeline.encode_prompt(texts, torch.device("cpu"))
        lengths = [embeds.shape[1]] * len(texts) if mask is None else mask.sum(dim=1).tolist()
        found |= {text: row[:length] for text, row, length in zip(texts, embeds, lengths, strict=True)}
    return found


def _save(
    file: Path, demo: DemoTeacher, parts: dict[str, Any], generator: torch.Generator, step: int, order: Tensor
) -> None:
    """All that the rest of a training depends on."""
    own = {"demo": demo.model_dump(), "step": step, "order": order, "generator": generator.get_state()}
    content = io.BytesIO()
    torch.save(own | {name: part.state_dict() for name, part in parts.items()}, content)
    atomic_write(file, content.getvalue())


def _restore(file: Path, demo: DemoTeacher, parts: dict[str, Any], generator: torch.Generator) -> tuple[int, Tensor]:
    """Steps that were done, and the order of the samples; the parts and the generator are as they were then.

    Raises:
        UserError: the file was written with another `demo` section, or cannot be read.
    """
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as fault:
        raise UserError(f"{file} cannot be read ({brief(fault)}); remove it to train the teacher anew") from None
    if kept["demo"] != demo.model_dump():
        raise UserError(f"{file} is of a teacher with another section 'demo'; remove it to train the teacher anew")
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    generator.set_state(kept["generator"])
    return kept["step"], kept["order"]
