"""Where depth units start: at the blocks of their span, or at units of an earlier run that stand for some of them.

Weights are read from files, tensor by tensor: whoever starts a unit holds that unit and one more tensor.
Shapes: B batch, S tokens of a stream, C channels, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppcl_ds.distill.least_squares import Arrivals
from ppcl_ds.distill.library import UnitLayer
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, TrainingFolder
from ppcl_ds.teacher.anatomy import Block, block_shapes, stream_served
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.teacher.modeling_pruned import read_ffn
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint, sources_of
from ppcl_ds.units.loss import counted
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan

Span = tuple[int, int]


@dataclass(frozen=True)
class Earlier:
    """Depth units that an earlier run has trained."""

    checkpoint: Checkpoint
    units: Mapping[Span, UnitPlan]


def open_earlier(recipe: Recipe, teacher: Teacher, plan: Plan) -> Earlier | None:
    """What `distill.start_from` names; None where it names nothing.

    Raises:
        UserError: it is no run that was trained, is of another teacher, or has no unit within a span of the plan.
    """
    run = recipe.distill.start_from
    if run is None:
        return None
    if run.resolve() == recipe.run.resolve():
        raise UserError(f"distill.start_from: {run} is the folder of this run; give that of an earlier one")
    folder = TrainingFolder(run, "distill")
    if not folder.begun:
        raise UserError(f"distill.start_from: {run} has no checkpoint of `ppcl distill`; give the folder of a run")
    found, checkpoint = load_plan(folder.plan, teacher), newest_checkpoint(folder.checkpoints)
    units = {unit.span: unit for unit in found.units if unit.takes_blocks and unit.name in checkpoint.contents.units}
    for span, unit in units.items():
        shapes = {name: list(shape) for name, shape in block_shapes(teacher.module(teacher.blocks[span[0]])).items()}
        trained = checkpoint.contents.units[unit.name].parameters
        if any(shapes.get(name) != shape for name, shape in trained.items()):
            raise UserError(f"distill.start_from: unit '{unit.name}' of {run} is not shaped like this teacher's blocks")
    spans = [unit.span for unit in plan.units if unit.takes_blocks]
    if not any(first <= u and v <= last for first, last in spans for u, v in units):
        raise UserError(f"distill.start_from: no unit of {run} lies in a span of {recipe.plan_file}")
    return Earlier(checkpoint, units)


def tiles(span: Span, units: Collection[Span]) -> list[Span]:
    """A span cut into as few pieces as possible, each a unit or one block; of several ways, that of longer first ones.

    Args:
        units: spans of units.
    """
    first, last = span
    shortest: dict[int, list[Span]] = {last + 1: []}
    for block in range(last, first - 1, -1):
        ends = sorted({block, *(v for u, v in units if u == block and v <= last)}, reverse=True)
        shortest[block] = min(([(block, end), *shortest[end + 1]] for end in ends), key=len)
    return shortest[first]


def pieces_of(unit: UnitPlan, teacher: Teacher, earlier: Earlier | None) -> list[Sources]:
    """What stands in the span of a depth unit, in order: of each piece, the tensors by their name in a block."""
    pieces: list[Sources] = []
    for piece in tiles(unit.span, earlier.units if earlier else ()):
        block = teacher.blocks[piece[0]]
        names = block_shapes(teacher.module(block))
        own = {name: teacher.files.source(f"{block.key}.{name}") for name in names}
        if earlier and piece in earlier.units:
            own |= sources_of(earlier.checkpoint, earlier.units[piece].name)
        pieces.append(own)
    return pieces


def start_depth_units(
    layers: Sequence[UnitLayer],
    plan: Plan,
    teacher: Teacher,
    how: str,
    earlier: Earlier | None,
    arrivals: Arrivals,
    group: dist.ProcessGroup,
) -> None:
    """Give the depth units of this stage the weights that they start from.

    Every rank must call it, as it may run the teacher; afterwards all replicas of a stage hold the same weights.

    Args:
        layers: of this stage; width units among them stay as they are.
        how: the recipe's `distill.start`.
        group: the replicas of this stage.
    """
    pieces = {unit.name: pieces_of(unit, teacher, earlier) for unit in plan.units if unit.takes_blocks}
    unlike = [name for name, own in pieces.items() if how in ("mean", "best") and not _alike(own)]
    for name in unlike:
        pieces[name] = pieces[name][:1]
        if dist.get_rank() == 0:
            span = list(plan.unit(name).span)
            print(f"note: unit '{name}' starts from its first block: those of {span} are not shaped alike", flush=True)
    own = [layer for layer in layers if layer.plan.takes_blocks]
    for layer in own:
        load(layer.unit.core, mean_of(pieces[layer.name]) if how == "mean" else pieces[layer.name][0])
    if how == "best":
        _choose(own, pieces, arrivals, group)
    if how == "scaled":
        several = [layer for layer in own if len(pieces[layer.name]) > 1]
        factors = fit_factors(several, arrivals, group)
        both = {name: [each[0]] * min(2, len(each)) for name, each in pieces.items()}
        for layer in several:
            outputs = residual_outputs(teacher.blocks[layer.plan.span[0]], layer.unit.core)
            both[layer.name][1] = scaled(both[layer.name][0], outputs, factors[layer.name])
        _choose(own, both, arrivals, group)


def _alike(pieces: Sequence[Sources]) -> bool:
    shapes = [{name: source.shape for name, source in piece.items()} for piece in pieces]
    return all(each == shapes[0] for each in shapes)


@torch.no_grad()
def load(core: nn.Module, sources: Sources) -> None:
    """Give a unit these weights, in place and in its own dtype, a tensor at a time."""
    state = core.state_dict()
    for name, source in sources.items():
        state[name].copy_(source.load())


def mean_of(pieces: Sequence[Sources]) -> Sources:
    """The mean of their weights, float32; a piece by itself as it is."""
    if len(pieces) == 1:
        return pieces[0]
    return {
        name: replace(first, dtype=torch.float32, load=partial(_mean, [piece[name] for piece in pieces]))
        for name, first in pieces[0].items()
    }


def _mean(sources: Sequence[Source]) -> Tensor:
    total = sources[0].load().float()
    for source in sources[1:]:
        total = total + source.load().float()
    return total / len(sources)


def _choose(
    layers: Sequence[UnitLayer],
    candidates: Mapping[str, Sequence[Sources]],
    arrivals: Arrivals,
    group: dist.ProcessGroup,
) -> None:
    """Start each unit from that candidate which has the least loss: a pass over the samples for each.

    Args:
        candidates: of every unit of the plan, so that all ranks make equally many passes.
    """
    most = max(map(len, candidates.values()), default=1)
    losses: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for number in range(most if most > 1 else 0):
        trying = [layer for layer in layers if number < len(candidates[layer.name])]
        for layer in trying:
            load(layer.unit.core, candidates[layer.name][number])
            losses[layer.name].append(torch.zeros((), dtype=torch.float64, device=_device(layer)))
        for arrived in arrivals():
            for layer in trying:
                losses[layer.name][number] += layer.loss(arrived[layer.name]).detach()
    for layer in layers if most > 1 else ():
        total = torch.stack(losses[layer.name])
        dist.all_reduce(total, group=group)
        load(layer.unit.core, candidates[layer.name][int(total.nan_to_num(torch.inf).argmin())])
        layer.drain()  # these were no losses of training


def fit_factors(
    layers: Sequence[UnitLayer], arrivals: Arrivals, group: dist.ProcessGroup
) -> dict[str, dict[str, float]]:
    """How much more of what a unit adds to a stream would be most like what its span adds, in the least squares.

    With `b = s - h` and `d = t - h`, of the unit's output s, the teacher's t and what enters, h, over the tokens that
    count: `sum <b, d> / sum <b, b>`.

    Returns:
        Unit -> stream -> factor.
    """
    sums: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
    for arrived in arrivals():
        for layer in layers:
            batch = arrived[layer.name]
            outputs = layer.unit(batch.inputs, batch.conditioning)
            for stream in layer.plan.outputs:
                mask = batch.mask_of(stream)
                tensors = (batch.inputs[stream], outputs[stream].detach(), batch.targets[stream])
                entered, own, true = (counted(tensor, mask).double() for tensor in tensors)  # (N, C)
                added, wanted = own - entered, true - entered
                pair = torch.stack([(added * wanted).sum(), added.square().sum()])
                sums[layer.name][stream] = sums[layer.name].get(stream, 0) + pair
    for each in sums.values():
        for total in each.values():
            dist.all_reduce(total, group=group)
    return {
        name: {stream: float(total[0] / total[1]) if total[1] else 1.0 for stream, total in each.items()}
        for name, each in sums.items()
    }


def residual_outputs(block: Block, module: nn.Module) -> dict[str, list[str]]:
    """Stream -> the linears of a block whose outputs are added to it: the last ones of its attentions and feed-forward.

    What serves two streams at once, as in FLUX's single blocks, is left out.
    """
    found: dict[str, list[str]] = {stream: [] for stream in block.returns}
    for name, part in module.named_children():
        for own, stream in (("to_out", stream_served(name, block.reads)), ("to_add_out", "text")):
            linear = getattr(part, own, None)
            if linear is not None and stream in found:
                found[stream].append(f"{name}.{own}" if isinstance(linear, nn.Linear) else f"{name}.{own}.0")
    for stream, name in block.ffn.items():
        with suppress(ValueError):  # a mixture of experts has no last linear
            found.get(stream, []).append(f"{name}.{read_ffn(module.get_submodule(name)).down}")
    return found


def scaled(sources: Sources, outputs: Mapping[str, Sequence[str]], factors: Mapping[str, float]) -> Sources:
    """Weights whose linears in `outputs` put out so much more."""
    by = {linear: factor for stream, factor in factors.items() for linear in outputs.get(stream, ())}

    def times(name: str, source: Source) -> Source:
        factor = by.get(name.rpartition(".")[0])
        return source if factor is None else replace(source, load=lambda: source.load() * factor)

    return {name: times(name, source) for name, source in sources.items()}


def _device(layer: UnitLayer) -> torch.device:
    return next(layer.unit.core.parameters()).device
