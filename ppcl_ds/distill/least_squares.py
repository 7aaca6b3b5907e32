"""Where width units start: least squares on the teacher's activations, before the first training step.

Shapes: N tokens that count, C_in and C_out channels of a linear, H hidden channels of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppcl_ds import launch
from ppcl_ds.distill.library import UnitLayer
from ppcl_ds.probing.linear import Moments, fit_linear
from ppcl_ds.units.loss import counted
from ppcl_ds.units.unit import Regression, UnitBatch, WidthUnit

_SUMS = 8 * 2**30
"""Most bytes of sums at a time, whatever room there is before the first forward: it needs room, too."""

Arrivals = Callable[[], Iterable[Mapping[str, UnitBatch]]]
"""Starts another pass over the samples: of each micro-batch, unit -> what it reads."""


@torch.no_grad()
def calibrate(
    layers: Iterable[UnitLayer], arrivals: Arrivals, group: dist.ProcessGroup, ridge: float, narrows: bool
) -> None:
    """Choose hidden channels and solve every linear of the width units of this stage.

    Every rank must call it, as reading the samples runs the teacher; afterwards all replicas of a stage hold the same
    weights. What is summed does not depend on the topology, up to rounding in float64.

    Args:
        layers: of this stage.
        group: the replicas of this stage.
        ridge: relative to the mean diagonal of the Gram matrix.
        narrows: whether any unit of the plan, on whichever stage, keeps some hidden channels; they are chosen in a pass
            of its own.
    """
    own = [layer for layer in layers if isinstance(layer.unit, WidthUnit)]
    if narrows:
        _choose_channels([layer for layer in own if layer.unit.undecided], arrivals, group)
    parts = _in_parts(own, min(_SUMS, launch.room()))
    for number in range(max(launch.all_gather(len(parts)))):  # all ranks read them equally often
        _solve(parts[number] if number < len(parts) else [], arrivals, group, ridge)


def _in_parts(layers: list[UnitLayer], most_bytes: int) -> list[list[UnitLayer]]:
    """Layers whose sums fill so much memory at a time; each part is a pass over the samples."""
    parts: list[list[UnitLayer]] = []
    filled = 0
    for layer in layers:
        linears = [module for module in layer.unit.modules() if isinstance(module, nn.Linear)]
        size = sum(8 * each.in_features * (each.in_features + each.out_features) for each in linears)
        if not parts or filled + size > most_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(layer)
        filled += size
    return parts


def _solve(layers: list[UnitLayer], arrivals: Arrivals, group: dist.ProcessGroup, ridge: float) -> None:
    sums: dict[tuple[str, str], Moments] = {}
    linears = {}
    for name, regression, mask in _regressions(layers, arrivals):
        key = name, regression.name
        sums[key] = _add(sums.get(key), counted(regression.x, mask), counted(regression.y, mask))
        linears[key] = regression.linear
    for key, linear in linears.items():
        settle(linear, Moments(*(_total(part, group) for part in sums[key])), ridge)


@torch.no_grad()
def settle(linear: nn.Linear, sums: Moments, ridge: float) -> None:
    """Give a linear the least-squares solution; one without a bias has no constant to be solved for."""
    if linear.bias is None:  # means that are taken for zero leave nothing to a constant
        sums = sums._replace(x=torch.zeros_like(sums.x), y=torch.zeros_like(sums.y))
    solution = fit_linear(sums, ridge)
    linear.weight.copy_(solution.weight.T)
    if linear.bias is not None:
        linear.bias.copy_(solution.bias)


def _regressions(layers: list[UnitLayer], arrivals: Arrivals) -> Iterator[tuple[str, Regression, Tensor | None]]:
    """Of every micro-batch: the unit's name, the regression and which of its tokens count."""
    for arrived in arrivals():
        for layer in layers:
            batch = arrived[layer.name]
            assert isinstance(layer.unit, WidthUnit)
            for regression in layer.unit.regressions(batch.inputs, batch.targets):
                yield layer.name, regression, batch.mask_of(regression.name)


def _choose_channels(layers: list[UnitLayer], arrivals: Arrivals, group: dist.ProcessGroup) -> None:
    scores: dict[tuple[str, str], Tensor] = {}
    choosers = {}
    for arrived in arrivals():
        for layer in layers:
            assert isinstance(layer.unit, WidthUnit)
            batch = arrived[layer.name]
            for stream, count in layer.unit.undecided.items():
                key, tokens = (layer.name, stream), counted(batch.inputs[stream], batch.mask_of(stream))
                scores[key] = scores.get(key, 0) + layer.unit.importance(stream, tokens)
                choosers[key] = partial(layer.unit.choose, stream), count
    for key, (choose, count) in choosers.items():
        choose(_total(scores[key], group).topk(count).indices.sort().values)
    for layer in layers:
        layer.unit.free_calibration()


def _add(sums: Moments | None, x: Tensor, y: Tensor) -> Moments:
    """Sums with another N tokens in them: x (N, C_in), y (N, C_out)."""
    x, y = x.double(), y.double()
    tokens = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
    own = Moments(x.T @ x, x.T @ y, x.sum(0), y.sum(0), tokens)
    return own if sums is None else Moments(*(a + b for a, b in zip(sums, own, strict=True)))


def _total(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    part = part.contiguous()
    dist.all_reduce(part, group=group)
    return part
