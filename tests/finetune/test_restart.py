"""Whatever stops a fine-tuning, it goes on as if nothing had happened, nobody hangs, and what it shows is complete."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils.rnn import pad_sequence

from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import NoisyStream, place_quantiles
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.variant import assembled
from ppcl_ds.watch.tensorboard import read_scalars
from tests.calls import answer, arguments_by_hand, packed
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.plans import image_spans
from tests.ranks import run

STEPS = 6
SETTINGS = {
    "steps": STEPS,
    "micro_batch": 4,
    "micro_batches_per_step": 4,
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    "boundary_weight": 0.1,
    "ema": 0.5,
    "log_every": 1,
    "sample_every": 3,
    "checkpoint_every": 2,
    "timeout": 20,
}
DEATH = "1:forward:20"
"""Who dies where and when (see `tests/training/dying.py`): after the checkpoint of step 2.

Other deaths are told of in `tests/training/test_restart.py`: both trainings share their saver and their engine.
"""


def new(new_run: Callable[..., Path], **changes: Any) -> Path:
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = SETTINGS | changes
    path.write_text(yaml.safe_dump(raw))
    pretend_trained(path, "qwen")
    return path


def outcome(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything in TensorBoard but times and memory, and every tensor of the last checkpoint."""
    folder = load_recipe(path).finetuning("small")
    shown = read_scalars(folder.board)
    timed = ("seconds/", "memory_gib/", "run/samples", "run/flops", "run/share")
    curves = {name: points for name, points in shown.items() if not name.startswith(timed)}
    checkpoint = newest_checkpoint(folder.checkpoints)
    assert checkpoint.contents.step == STEPS
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
    tensors = {f"{part}/{what}": flat(checkpoint, part, what) for part in checkpoint.contents.units for what in kinds}
    return curves, tensors


def flat(checkpoint: Any, part: str, what: str) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in checkpoint.unit(part, what).values()])


def test_a_run_with_a_killed_rank_ends_as_one_that_never_was(new_run: Callable[..., Path]) -> None:
    straight, stopped = new(new_run), new(new_run)
    command("finetune", straight, "--variant", "small")
    done = run("tests.training.dying", "finetune", stopped, "--variant", "small", env={"DIE": DEATH})
    assert done.returncode != 0
    assert "was ended by SIGKILL" in done.stderr, done.stderr
    assert newest_checkpoint(load_recipe(stopped).finetuning("small").checkpoints).contents.step == 2
    command("finetune", stopped, "--variant", "small", "--until", "3")
    command("finetune", stopped, "--variant", "small")
    (curves, tensors), (expected_curves, expected_tensors) = outcome(stopped), outcome(straight)
    assert curves == expected_curves
    torch.testing.assert_close(tensors, expected_tensors, rtol=0, atol=0)

    levels = ("0.1", "0.3", "0.5", "0.7", "0.9")
    held_out = {f"heldout/{kind}/{level}" for kind in ("flow", "velocity") for level in levels}
    boundaries = {"boundary/0/image/loss", "boundary/1/image/loss"}
    assert {"run/loss", "run/learning_rate", "flow/loss", "velocity/loss"} | held_out | boundaries <= curves.keys()
    assert [step for step, _ in curves["heldout/flow/0.5"]] == [3, 6]
    parts = [values(curves, name) for name in ("velocity/loss", *boundaries)]
    total = [velocity + 0.1 * (one + other) for velocity, one, other in zip(*parts, strict=True)]
    assert values(curves, "run/loss") == pytest.approx(total, rel=1e-5)
    events = EventAccumulator(str(load_recipe(straight).finetuning("small").board))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples/teacher", "samples/variant"}


def values(curves: dict[str, Any], name: str) -> list[float]:
    return [value for _, value in curves[name]]


def test_the_look_at_held_out_data_is_that_of_the_whole_model(new_run: Callable[..., Path]) -> None:
    """Untrained yet: the pipeline's held-out losses against those of the assembled model in one process."""
    path = new(new_run, optimizer={"lr": 1e-3, "warmup_steps": 10}, steps=1, checkpoint_every=1, sample_every=1)
    command("finetune", path, "--variant", "small")  # its first step has a learning rate of zero
    recipe = load_recipe(path)

    opened = open_teacher(recipe)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    student: Any = assembled(opened, image_spans("qwen"), "small", lambda unit: checkpoint.unit(unit.name))
    assert opened.files.model_class is not None
    teacher = opened.files.model_class.from_pretrained(opened.files.folder)
    [(_, clean)] = islice(NoisyStream(recipe, opened.call, "heldout", 8).clean.take(0, 1), 1)
    texts = [sample.prompt.text[0][0][0] for sample in clean.samples]
    embeds, lengths = pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts])
    mask = torch.arange(embeds.shape[1]) < lengths[:, None]
    shown = read_scalars(recipe.finetuning("small").board)
    quantiles = (0.1, 0.3, 0.5, 0.7, 0.9)
    seeds = [recipe.seed + number for number in range(len(clean.latents))]  # a sample is the same whoever reads it
    alone = clean.latents[:1].shape
    noise = torch.cat([torch.randn(alone, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for quantile, place in zip(quantiles, place_quantiles(recipe.noise, quantiles), strict=True):
        level = 1 - int(place * 1000) / 1000  # of a thousand rungs, from pure noise down
        noisy = (1 - level) * clean.latents + level * noise
        arguments = arguments_by_hand(opened.class_name, noisy, embeds, torch.full((8,), level), mask, None)
        own, true = (answer(model, arguments) for model in (student, teacher))
        flow, velocity = ((own - target).square().mean() for target in (packed(noise - clean.latents), true))
        assert shown[f"heldout/flow/{quantile:g}"][0][1] == pytest.approx(float(flow), rel=1e-4)
        assert shown[f"heldout/velocity/{quantile:g}"][0][1] == pytest.approx(float(velocity), rel=1e-4)
