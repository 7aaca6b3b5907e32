"""What trained units cost: each is plugged into the teacher alone, and a few sets of them together.

K units, B samples, N numbers in what is said of a piece.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from math import isfinite
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ppcl_ds import launch, memory
from ppcl_ds.console import Advance, progress, track
from ppcl_ds.errors import UserError
from ppcl_ds.planning.swaps import MeasuredSet, Swaps, draw_sets
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.teacher.anatomy import Block, Capture, Wanted
from ppcl_ds.teacher.branches import LEVELS
from ppcl_ds.teacher.comparison import Comparison, Piece, measures_of
from ppcl_ds.teacher.noising import DTYPES, NoisyStream
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.sharded import forget_order, load_teacher
from ppcl_ds.teacher.teacher import Teacher, forward, read_teacher
from ppcl_ds.training.checkpoint import Checkpoint
from ppcl_ds.units.depth import depth_unit
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.plugging import plugged
from ppcl_ds.units.unit import Unit

_ROUNDS = 6
"""Most times that the planner may choose anew."""

_AT_ONCE = 2**20
"""Numbers of a unit's that are float64 at a time."""

_REPEATS = 12
"""Times that a block is run to say how long it takes; the first quarter is warming up."""


class SwapBench:
    """The sharded teacher and a trained library on this rank; every rank makes one and makes every call.

    Each rank holds the whole library in CPU memory, and on its device only the units that are plugged in.

    Args:
        library: the plan that the checkpoint was trained with.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        library: Plan,
        checkpoint: Checkpoint,
        device: torch.device,
    ) -> None:
        self.recipe, self.teacher, self.library, self.device = recipe, teacher, library, device
        self.dtype, self.measures = DTYPES[recipe.teacher.precision], measures_of(recipe, teacher.call)
        config = teacher_config(recipe)
        self.sharded = load_teacher(teacher, config, self.dtype, recipe.teacher.ranks_per_copy)
        self.units = {unit.name: build_unit(unit, teacher, self.dtype) for unit in library.units}
        for name, unit in self.units.items():
            unit.core.load_state_dict(checkpoint.unit(name))
            unit.free_calibration()

    @cached_property
    def comparison(self) -> Comparison:
        """What is measured on: held-out samples that `ppcl evaluate` does not read, where there are more.

        They are the next ones, or the same again under another noise, so that variants are not judged by what they were
        chosen by.
        """
        settings = self.recipe.evaluate
        stored = NoisyStream(self.recipe, self.teacher.call, "heldout", 1, captions=True).clean
        numbers = range(settings.samples, settings.samples + self.recipe.plan.prompts)
        return Comparison(
            self.recipe,
            self.teacher,
            partial(forward, self.sharded),
            self.device,
            dist.get_rank(),
            dist.get_world_size(),
            micro_batch=settings.batch_size,
            first=settings.velocity_batches,
            batches=settings.velocity_batches,
            prompts=[stored.batch(number).samples[0] for number in numbers],
            number=settings.samples,
        )

    @memory.phase("units alone")
    def products(self) -> dict[str, Tensor]:
        """For every two units and by measure, the mean product of what either, plugged in alone, adds.

        Returns:
            Measure -> (K, K) float64, the same on every rank; on the diagonal each unit's mean squared error.
        """
        sums = {
            measure: torch.zeros(len(self.units), len(self.units), dtype=torch.float64) for measure in self.measures
        }
        counts = dict.fromkeys(self.measures, 0.0)
        for piece, added in self._added([self._plug((name,)) for name in self.units], "measure units"):
            for measure, alone in _stacked(added, piece.counts).items():
                counts[measure] += alone.shape[1]
                for some in alone.split(_AT_ONCE, dim=1):
                    sums[measure] += some.double() @ some.double().T
        return {measure: _mean(own, torch.tensor(counts[measure]), self.device) for measure, own in sums.items()}

    @memory.phase("sets of units")
    def errors(self, sets: Sequence[tuple[str, ...]], removed: bool = False) -> list[MeasuredSet]:
        """Mean squared differences from the teacher with each set of units; the same on every rank.

        Args:
            removed: instead, of the teacher without the blocks that the sets take out; that alone is filled in.
        """
        if not sets:
            return []
        # The last column is of what has no noise level.
        sums = {measure: torch.zeros(len(sets), LEVELS + 1, dtype=torch.float64) for measure in self.measures}
        counts = {measure: torch.zeros(LEVELS + 1, dtype=torch.float64) for measure in self.measures}
        how = [self._without(names) if removed else self._plug(names) for names in sets]
        title = f"measure {len(sets)} sets of units" + (" without training" if removed else "")
        for piece, added in self._added(how, title):
            for place, each in enumerate(added):
                for measure, difference in each.items() if piece.counts else ():
                    squares = difference.double().square().flatten(1).sum(1)
                    levels = torch.full((len(squares),), LEVELS) if piece.levels is None else piece.levels
                    sums[measure][place].index_add_(0, levels, squares)
                    if not place:
                        numbers = torch.full_like(squares, difference[0].numel())
                        counts[measure].index_add_(0, levels, numbers)
        found = [MeasuredSet(units=names, errors={}) for names in sets]
        for measure in self.measures:
            whole = _mean(sums[measure].sum(1), counts[measure].sum(), self.device).tolist()
            curves = _mean(sums[measure], counts[measure], self.device)[:, :LEVELS].tolist()
            for own, error, curve in zip(found, whole, curves, strict=True):
                (own.removed if removed else own.errors)[measure] = error
                if not removed and all(isfinite(point) for point in curve):
                    own.by_noise[measure] = curve
        return found

    def _added(
        self, ways: Sequence[Callable[[], AbstractContextManager[object]]], title: str
    ) -> Iterator[tuple[Piece, Iterator[dict[str, Tensor]]]]:
        """By pieces, what each way of changing the teacher adds to what it says, by measure; all have to be asked for.

        Blocks that a unit takes the place of are still called, and gathered: the order of fetching stays what it is.
        """
        pieces = self.comparison

        def differences(piece: Piece, advance: Advance) -> Iterator[dict[str, Tensor]]:
            ask = partial(forward, self.sharded)
            with torch.no_grad():
                reference = piece.says(ask)
                for way in ways:
                    with way():
                        said = piece.says(ask)
                    advance(1)
                    yield {measure: own - reference[measure] for measure, own in said.items()}

        with progress(title, len(pieces) * len(ways)) as advance:
            for piece in pieces:
                yield piece, differences(piece, advance)

    def _plug(self, names: tuple[str, ...]) -> Callable[[], AbstractContextManager[object]]:
        """With these units in the teacher, which are on the device meanwhile."""
        plan = self.library.model_copy(update={"variants": {"set": names}})

        @contextmanager
        def inside() -> Iterator[None]:
            units = {name: self.units[name].to(self.device) for name in names}
            with plugged(self.sharded.module, self.teacher.anatomy, plan, "set", units):
                yield
            for unit in units.values():
                unit.cpu()

        return inside

    def _without(self, names: tuple[str, ...]) -> Callable[[], AbstractContextManager[object]]:
        """Without the blocks that these units take out; streams pass through them."""
        units = [unit for unit in self.library.units if unit.name in names and unit.takes_blocks]
        gone = [block for unit in units for block in unit.members]
        return lambda: self.teacher.anatomy.bypassed(self.sharded.module, gone)

    @memory.phase("times of blocks")
    def seconds(self) -> tuple[list[float], dict[str, float]]:
        """How long each of the teacher's blocks takes for one sample, and what each width unit saves of that.

        Every rank times its share of the blocks on its own device, and is told of all. Each block is built by itself
        and called as the teacher calls it.
        """
        samples = read_samples(self.recipe, self.teacher, self.sharded, "heldout", 1, 0, 1, self.device)
        _, batch = next(samples)
        calls = Wanted(frozenset(range(len(self.teacher.blocks))), frozenset())
        forget_order(self.sharded)  # this forward ends before those of the products and sets do
        capture = read_teacher(self.sharded, self.teacher, batch, calls)
        forget_order(self.sharded)
        own = self.teacher.blocks[dist.get_rank() :: dist.get_world_size()]
        times = {block.index: self._times(block, capture) for block in track(own, "time blocks", len(own))}
        everybodys = {index: found for each in launch.all_gather(times) for index, found in each.items()}
        blocks = [everybodys[block.index][None] for block in self.teacher.blocks]
        saved: dict[str, float] = {}
        for index, found in sorted(everybodys.items()):
            for name, left in found.items():
                if name is not None:
                    saved[name] = saved.get(name, 0.0) + blocks[index] - left
        return blocks, saved

    def _times(self, block: Block, capture: Capture) -> dict[str | None, float]:
        """Seconds of a block's forward, as it is (None) and with each width unit that is in it."""
        stock = depth_unit(self.teacher, block.index, self.dtype)  # read once
        narrowed = [u for u in self.library.units if not u.takes_blocks and block.index in u.changed]
        found: dict[str | None, float] = {}
        for unit in (*narrowed, None):
            module = copy.deepcopy(stock) if unit else stock
            if unit:
                unit.behaviour.shrink(unit, module.core, block, capture.streams[block.entering])
            found[unit.name if unit else None] = self._time(module, block, capture)
        return found

    def _time(self, module: Unit, block: Block, capture: Capture) -> float:
        module.to(self.device)
        times = []
        for _ in range(_REPEATS):
            get_accelerator().synchronize()
            began = time.perf_counter()
            with torch.no_grad():
                module(capture.streams[block.entering], capture.conditioning[block.index])
            get_accelerator().synchronize()
            times.append(time.perf_counter() - began)
        return median(times[_REPEATS // 4 :])


def measure_swaps(
    bench: SwapBench,
    checkpoint: str,
    choose: Callable[[Swaps], Iterable[tuple[str, ...]]],
    trained: int = 0,
    falls: Sequence[float] = (),
) -> Swaps:
    """Everything that the planner wants to know of a trained library; every rank must call this.

    What it then chooses is measured, too, and it may choose again: a forecast errs most where it promises most. Of the
    sets that it chooses in the end it is also measured what removing their blocks costs without training.

    Args:
        checkpoint: the folder that the units come from.
        choose: the sets that the planner would plug, from what is known so far.
        trained: steps behind the units.
        falls: how fast their errors fall, see `Swaps`; of rank 0 alone.
    """
    sets = draw_sets(bench.library, bench.recipe.seed)
    products = {measure: own.tolist() for measure, own in bench.products().items()}
    seconds, saved = bench.seconds()
    measured: list[MeasuredSet] = []
    for _ in range(_ROUNDS):
        measured += bench.errors(sets)
        swaps = Swaps(
            checkpoint=checkpoint,
            units=bench.library.units,
            products=products,
            sets=measured,
            seconds=seconds,
            saved=saved,
            trained=trained,
            falls=list(falls),
        )
        # Rank 0 decides for all: times of blocks, and what a solver makes of them, are its own.
        chosen = [_chosen(choose, swaps) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        wanted = list(dict.fromkeys(chosen[0] or ()))
        sets = [names for names in wanted if swaps.errors_of(names) is None]
        if not sets:
            break
    # Units alone, so far without noise levels; and what was chosen last.
    swaps.sets += bench.errors([names for names in wanted if swaps.set_of(names) is None])
    removed = {frozenset(each.units): each.removed for each in bench.errors(wanted, removed=True)}
    for each in swaps.sets:
        each.removed = removed.get(frozenset(each.units), {})
    return swaps


def _chosen(choose: Callable[[Swaps], Iterable[tuple[str, ...]]], swaps: Swaps) -> list[tuple[str, ...]]:
    """What the planner would plug; nothing where it cannot choose, which it will say again when everybody has left."""
    try:
        return list(choose(swaps))
    except UserError:
        return []


def _stacked(added: Iterator[dict[str, Tensor]], counts: bool) -> dict[str, Tensor]:
    """Measure -> (K, N) float32; nothing where it does not count, though all of it was asked for."""
    every = list(added) if counts else [{} for _ in added]
    return {measure: torch.stack([each[measure].flatten() for each in every]) for measure in every[0]}


def _mean(sums: Tensor, count: Tensor, device: torch.device) -> Tensor:
    """Sums over this rank's numbers, and their count -> the mean over all ranks'; not finite where there is none."""
    everything = torch.cat([sums.flatten(), count.flatten().double()]).to(device)
    dist.all_reduce(everything)
    means = everything.cpu()
    return means[: sums.numel()].view(sums.shape) / means[sums.numel() :].view(count.shape)
