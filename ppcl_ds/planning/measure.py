"""What trained units cost: each is plugged into the teacher alone, and a few sets of them together.

K units, N numbers in the velocities of a batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ppcl_ds import launch, memory
from ppcl_ds.console import track
from ppcl_ds.errors import UserError
from ppcl_ds.planning.swaps import MeasuredSet, Swaps, draw_sets
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.teacher.anatomy import Block, Capture, Wanted
from ppcl_ds.teacher.noising import DTYPES, NoisyBatch
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.sharded import forget_order, load_teacher
from ppcl_ds.teacher.teacher import Teacher, read_teacher
from ppcl_ds.training.checkpoint import Checkpoint
from ppcl_ds.units.depth import depth_unit
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.plugging import plugged
from ppcl_ds.units.unit import Unit

_ROUNDS = 6
"""Most times that the planner may choose anew."""

_AT_ONCE = 2**20
"""Numbers of a velocity that are float64 at a time."""

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
        self.dtype = DTYPES[recipe.teacher.precision]
        config = teacher_config(recipe)
        self.sharded = load_teacher(teacher, config, self.dtype, recipe.teacher.ranks_per_copy)
        self.units = {unit.name: build_unit(unit, teacher, self.dtype) for unit in library.units}
        for name, unit in self.units.items():
            unit.core.load_state_dict(checkpoint.unit(name))
            unit.free_calibration()

    @memory.phase("velocities")
    def products(self) -> Tensor:
        """For every two units, the mean product of what either, plugged in alone, adds to the velocity.

        Returns:
            (K, K) float64, the same on every rank; on the diagonal each unit's mean squared error.
        """
        names = list(self.units)
        sums = torch.zeros(len(names), len(names), dtype=torch.float64)
        count = 0
        for counts, batch in self._batches("measure units"):
            reference = self._velocity(batch, ())
            alone = torch.stack([self._velocity(batch, (name,)) - reference for name in names])
            for some in alone.split(_AT_ONCE, dim=1) if counts else ():
                sums += some.double() @ some.double().T
            if counts:
                count += reference.numel()
        return self._mean(sums, count)

    @memory.phase("velocities")
    def errors(self, sets: Sequence[tuple[str, ...]]) -> list[float]:
        """Mean squared difference from the teacher's velocity with each set of units; the same on every rank."""
        if not sets:
            return []
        sums, count = torch.zeros(len(sets), dtype=torch.float64), 0
        for counts, batch in self._batches(f"measure {len(sets)} sets of units"):
            reference = self._velocity(batch, ())
            together = [(self._velocity(batch, names) - reference).double().square().sum() for names in sets]
            if counts:
                sums += torch.stack(together)
                count += reference.numel()
        return self._mean(sums, count).tolist()

    def _mean(self, sums: Tensor, count: int) -> Tensor:
        """Sums over this rank's numbers -> the mean over all ranks'."""
        everything = torch.cat([sums.flatten(), torch.tensor([float(count)], dtype=torch.float64)]).to(self.device)
        dist.all_reduce(everything)
        return (everything[:-1] / everything[-1]).view(sums.shape).cpu()

    def _batches(self, title: str) -> Iterator[tuple[bool, NoisyBatch]]:
        """This rank's micro-batches, and whether each counts: all ranks run the teacher together, equally often.

        They come after those that `ppcl evaluate` reads: the next held-out samples, or the same again under another
        noise where there are no more, so that variants are not judged by what they were chosen by.
        """
        settings, world = self.recipe.evaluate, dist.get_world_size()
        rounds = -(-settings.velocity_batches // world)
        samples = self._samples(settings.batch_size, settings.velocity_batches + dist.get_rank(), world)
        for number, batch in track(islice(samples, rounds), title, rounds):
            yield number < 2 * settings.velocity_batches, batch

    def _samples(self, size: int, start: int, stride: int) -> Iterator[tuple[int, NoisyBatch]]:
        return read_samples(self.recipe, self.teacher, self.sharded, "heldout", size, start, stride, self.device)

    def _velocity(self, batch: NoisyBatch, names: tuple[str, ...]) -> Tensor:
        """What the teacher with these units says, (N,) float32 on the CPU.

        Blocks that a unit takes the place of are still called, and gathered: the order of fetching stays what it is.
        """
        plan = self.library.model_copy(update={"variants": {"set": names}})
        inside = {name: self.units[name].to(self.device) for name in names}
        model, anatomy = self.sharded.module, self.teacher.anatomy
        with plugged(model, anatomy, plan, "set", inside), torch.no_grad():
            velocity = self.teacher.answer(self.sharded, batch)
        for unit in inside.values():
            unit.cpu()
        return velocity.float().cpu().flatten()

    @memory.phase("times of blocks")
    def seconds(self) -> tuple[list[float], dict[str, float]]:
        """How long each of the teacher's blocks takes for one sample, and what each width unit saves of that.

        Every rank times its share of the blocks on its own device, and is told of all. Each block is built by itself
        and called as the teacher calls it.
        """
        _, batch = next(self._samples(1, 0, 1))
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


def measure_swaps(bench: SwapBench, checkpoint: str, choose: Callable[[Swaps], Iterable[tuple[str, ...]]]) -> Swaps:
    """Everything that the planner wants to know of a trained library; every rank must call this.

    What it then chooses is measured, too, and it may choose again: a forecast errs most where it promises most.

    Args:
        checkpoint: the folder that the units come from.
        choose: the sets that the planner would plug, from what is known so far.
    """
    sets = draw_sets(bench.library, bench.recipe.seed)
    products, (seconds, saved) = bench.products().tolist(), bench.seconds()
    measured: list[MeasuredSet] = []
    for _ in range(_ROUNDS):
        errors = bench.errors(sets)
        measured += [MeasuredSet(units=names, error=error) for names, error in zip(sets, errors, strict=True)]
        swaps = Swaps(
            checkpoint=checkpoint,
            units=bench.library.units,
            products=products,
            sets=measured,
            seconds=seconds,
            saved=saved,
        )
        # Rank 0 decides for all: times of blocks, and what a solver makes of them, are its own.
        chosen = [_chosen(choose, swaps) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        sets = [names for names in dict.fromkeys(chosen[0] or ()) if swaps.error_of(names) is None]
        if not sets:
            break
    return swaps


def _chosen(choose: Callable[[Swaps], Iterable[tuple[str, ...]]], swaps: Swaps) -> list[tuple[str, ...]]:
    """What the planner would plug; nothing where it cannot choose, which it will say again when everybody has left."""
    try:
        return list(choose(swaps))
    except UserError:
        return []
