"""The demo's teacher: a stock diffusers Qwen-Image transformer, tiny, trained from scratch on the digits in minutes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_folder
from ppcl_ds.console import track
from ppcl_ds.data.batch import Batch, Prompts
from ppcl_ds.data.noising import add_noise, draw_sigmas
from ppcl_ds.data.stream import MicroBatchStream, empty_prompt
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import DemoTeacher, Noise
from ppcl_ds.teacher.call import caller_for

_WARMUP_STEPS = 50
"""Enough for AdamW's second moments; zero-initialised modulation tolerates a short warm-up."""


def train_teacher(recipe: Recipe) -> None:
    """Train the demo's teacher on the encoded shards and save it as the diffusers folder `recipe.teacher.path`.

    The folder appears whole or not at all; one that is there already is kept. Runs in one process, on a GPU if there
    is one, and leaves torch's global random state as it was.

    Raises:
        UserError: the recipe has no `demo` section, or its `config` has a key that the transformer does not know.
    """
    if recipe.demo is None:
        raise UserError("key 'demo' is missing from the recipe: it says how large the demo's teacher is")
    if recipe.teacher.path.exists():
        return
    stream = MicroBatchStream(recipe.data, "train", recipe.demo.batch_size, recipe.seed, recipe.bad_samples)
    batches = (batch for _, batch in stream.take(start=0, stride=1))
    empty = empty_prompt(recipe.data)
    model = fresh_model(recipe.demo, recipe.seed).to(launch.device())
    fit(model, batches, empty, recipe.noise, recipe.demo, torch.Generator().manual_seed(recipe.seed))
    with atomic_folder(recipe.teacher.path) as folder:
        model.save_pretrained(folder)


def fresh_model(demo: DemoTeacher, seed: int) -> QwenImageTransformer2DModel:
    """A new transformer whose blocks are the identity and whose output is 0 (adaLN-zero, as in DiT)."""
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
    return model


def fit(
    model: QwenImageTransformer2DModel,
    batches: Iterable[Batch],
    empty: Prompts,
    noise: Noise,
    demo: DemoTeacher,
    generator: torch.Generator,
) -> None:
    """Flow matching: the model learns the velocity `noise - data`; it ends with the average of its weights.

    Args:
        model: float32, trained in place.
        batches: at least `demo.steps` of them.
        empty: the encoded empty caption, B = 1; stands in for dropped captions.
        noise: which noise levels, and how many captions are dropped.
        demo: steps, learning rate and averaging.
        generator: CPU generator for dropped captions, noise levels and noise.
    """
    caller = caller_for(type(model).__name__)
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARMUP_STEPS, demo.steps)
    # Its decay grows from 0.1, so that a short run does not remember the initial weights.
    average = EMAModel(model.parameters(), decay=demo.ema, foreach=True)
    steps = track(range(demo.steps), "training the teacher", demo.steps)
    for _, batch in zip(steps, batches, strict=False):
        seen = batch.drop_captions(empty, noise.caption_dropout, generator).to(model.device, torch.float32)
        sigmas = draw_sigmas(noise, len(seen.keys), generator).to(model.device)
        noisy, velocity = add_noise(seen.latents, sigmas, generator)
        loss = F.mse_loss(caller(model, noisy, seen.prompts, sigmas), velocity)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(model.parameters())
    average.copy_to(model.parameters())
