"""Samples to look at models by: noisy images where there are some, else images in the making, from captions alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ppcl_ds.data.stream import has_images
from ppcl_ds.recipe import Recipe
from ppcl_ds.sampling import Trajectories
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream
from ppcl_ds.teacher.teacher import Teacher, forward
from ppcl_ds.teacher.trajectories import TrajectoryStream


def read_samples(
    recipe: Recipe,
    teacher: Teacher,
    model: Any,
    split: Literal["train", "heldout"],
    micro_batch: int,
    start: int,
    stride: int,
    device: torch.device,
) -> Iterator[tuple[int, NoisyBatch]]:
    """Micro-batches start, start + stride, ... on the device, with their numbers, without end.

    Where a split is captions alone, they are of the teacher's trajectories, once its pools have settled, as the
    recipe's `distill.trajectories` says. Then the teacher is run for each, and before the first.

    Args:
        model: the teacher's transformer; where it is spread over ranks, all of them must iterate alike.
    """
    if has_images(recipe.data, split):
        for number, batch in NoisyStream(recipe, teacher.call, split, micro_batch).take(start, stride):
            yield number, batch.to(device)
        return
    settings = recipe.distill.trajectories or Trajectories()
    stream = TrajectoryStream(recipe, teacher.call, split, micro_batch, stride, settings)
    settling = settings.steps[1] * stride
    for number, batch in stream.take(start % stride, stride):
        batch = batch.to(device)
        if number - settling >= start:
            yield number - settling, batch
        with torch.no_grad():
            take_further(stream, batch, forward(model, batch.arguments), model)


def take_further(stream: TrajectoryStream, batch: NoisyBatch, output: Tensor | None, model: Any) -> None:
    """Tell a stream what the teacher says of a micro-batch, for which it is run once more where guidance needs that.

    Args:
        output: of the transformer for the micro-batch's arguments.
        model: the transformer; where it is spread over ranks, all of them must call this together.
    """
    other = other_branch(stream, batch, model)
    if batch.number is not None:
        assert output is not None
        stream.advance(batch.number, output, other)


def other_branch(stream: TrajectoryStream, batch: NoisyBatch, model: Any) -> Tensor | None:
    """What the model says of a micro-batch with the other prompts, where guidance needs that; see `take_further`."""
    if not stream.guides:
        return None
    # Every rank reads something, whatever its micro-batch is of.
    return forward(model, batch.arguments if batch.other is None else batch.other)
