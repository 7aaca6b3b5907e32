"""The ranks of `ppcl probe`: the sharded teacher reads calibration micro-batches, rank 0 writes a report or a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from ppcl_ds import launch, memory
from ppcl_ds.console import track
from ppcl_ds.data.stream import check_data
from ppcl_ds.errors import UserError
from ppcl_ds.probing.heatmaps import save_report
from ppcl_ds.probing.measure import Measured, measure, together
from ppcl_ds.probing.part_files import Contents, Part, Parts, made_with, write_part
from ppcl_ds.probing.report import make_report
from ppcl_ds.probing.sums import Lane, Sums, add_capture, lanes_of, ranges, wanted_for, zero_sums
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.teacher import Teacher, open_teacher, read_teacher, text_mask, unread_streams


def check(recipe: Recipe, part: str | None = None, merge: bool = False) -> Teacher:
    """Everything that can be wrong before a process starts.

    Raises:
        UserError: one line that says what.
    """
    if part and merge:
        raise UserError("--part and --merge: give one of them; parts are merged when all of them are there")
    if part:
        Part.parse(part, recipe.probe.batches)
    teacher = open_teacher(recipe)
    check_data(recipe.data, heldout=not merge)
    if not merge:
        launch.check_world(recipe.topology.world)
        teacher_config(recipe)
    return teacher


def probe(recipe: Recipe, teacher: Teacher, part: str | None = None) -> None:
    """Probe the teacher, or sum one part of the samples, unless it is the only one; every rank must call this."""
    reader = open_reader(recipe, teacher, launch.join(deterministic=recipe.deterministic))
    own = Part.parse(part, recipe.probe.batches) if part else Part()
    if own.count > 1:
        sum_part(reader, own)
    else:
        report_all(reader)
    launch.leave()


def report_all(reader: Reader) -> None:
    """Read all samples, measure, have rank 0 write the report; every rank must call this."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sums, ridge = reader.sums(Part()), reader.recipe.probe.ridge
    own = measure(reader.lanes, sums, len(reader.teacher.blocks), ridge, lambda block: block % world == rank)
    measured = together(launch.all_gather(own))
    if rank == 0:
        _report(reader.recipe, reader.teacher, measured, list(reader.unused))


def sum_part(reader: Reader, part: Part) -> None:
    """Read one part of the samples, have rank 0 write its sums; every rank must call this.

    Raises:
        UserError: rank 0 cannot write.
    """
    sums = reader.sums(part)
    if dist.get_rank() == 0:
        path = reader.recipe.probe_folder / "parts" / part.file
        contents = Contents(tuple(reader.lanes), tuple(reader.unused), made_with(reader.recipe, reader.teacher.files))
        try:
            write_part(path, contents, sums, reader.recipe.probe.max_span)
        except OSError as fault:
            raise UserError(f"{path}: {fault.strerror or fault}; the part is not written") from None
        print(f"wrote {path}")
    else:
        for _ in sums:
            pass


def merge_parts(recipe: Recipe, teacher: Teacher) -> None:
    """Add up the parts and report, in this process alone; on an accelerator if there is one.

    Raises:
        UserError: a part is missing, damaged, or was made otherwise.
    """
    parts = Parts(recipe.probe_folder / "parts", recipe, teacher.files)
    lanes = parts.contents.lanes
    passes = ranges(lanes, recipe.probe.max_span, recipe.probe.blocks_at_once, launch.own_room())
    sums = track(parts.sums(passes, launch.device()), "merge parts", len(passes))
    measured = measure(lanes, sums, len(teacher.blocks), recipe.probe.ridge, lambda block: True)
    _report(recipe, teacher, measured, list(parts.contents.unused))


def _report(recipe: Recipe, teacher: Teacher, measured: Measured, unused: list[str]) -> None:
    runs = [[block.index for block in run] for run in teacher.anatomy.runs]
    report = make_report(measured, teacher.class_name, unused, runs)
    save_report(report, recipe.probe_folder)
    spans = f"{len(report.spans)} spans of the paper's rule, {len(report.unstable)} of them unstable"
    print(f"wrote {recipe.probe_folder}/report.json: {spans}")


@dataclass
class Reader:
    """The sharded teacher and the streams in it that matter; every rank makes one (`open_reader`).

    Attributes:
        unused: streams that leave the last block and are read by nobody.
        boundary: bytes of what leaves a block, the most of any.
        at_work: bytes that a forward takes beside what it records.
    """

    recipe: Recipe
    teacher: Teacher
    sharded: Any
    lanes: Sequence[Lane]
    unused: Sequence[str]
    boundary: int
    at_work: int
    device: torch.device

    def sums(self, part: Part) -> Iterator[Sums]:
        """Sums over all ranks of each range of blocks, the last range first. Every rank must iterate, and gets all."""
        probe = self.recipe.probe
        passes = ranges(self.lanes, probe.max_span, probe.blocks_at_once, launch.room(self.at_work), self.boundary)
        for index, blocks in enumerate(passes, 1):
            name = f"probe blocks {blocks.start} to {blocks.stop - 1} (pass {index} of {len(passes)})"
            sums = zero_sums(self.lanes, blocks, probe.max_span, self.device)
            self._read(sums, blocks, part, name)
            for key in sorted(sums):
                for tensor in sums[key].tensors().values():
                    dist.all_reduce(tensor)
            yield sums
            sums.clear()  # before there is memory for the next ones

    @memory.phase("sums")
    def _read(self, sums: Sums, blocks: range, part: Part, name: str) -> None:
        """Add this rank's micro-batches: of W ranks, rank r takes every W-th of the part from the r-th on.

        All ranks run the sharded teacher equally often; one that has no micro-batch left in the last round reads one
        that it does not count.
        """
        probe, world = self.recipe.probe, dist.get_world_size()
        first = part.index - 1 + part.count * dist.get_rank()
        rounds = -(-len(range(part.index - 1, probe.batches, part.count)) // world)
        wanted = wanted_for(self.lanes, blocks, probe.max_span)
        stride = part.count * world
        samples = read_samples(
            self.recipe, self.teacher, self.sharded, "train", probe.batch_size, first, stride, self.device
        )
        for number, batch in track(islice(samples, rounds), name, rounds):
            capture = read_teacher(self.sharded, self.teacher, batch, wanted)
            if number < probe.batches:
                mask = text_mask(batch.arguments, capture)
                add_capture(sums, self.lanes, blocks, self.teacher.anatomy, number, capture, mask)


def open_reader(recipe: Recipe, teacher: Teacher, device: torch.device) -> Reader:
    """Load the teacher over all ranks and find out which of its streams matter; every rank must call this."""
    # DeepSpeed is imported by ranks only: it takes seconds and looks for accelerators.
    from deepspeed.accelerator import get_accelerator

    from ppcl_ds.teacher.sharded import load_teacher

    config = teacher_config(recipe)
    sharded = load_teacher(teacher, config, DTYPES[recipe.teacher.precision], recipe.teacher.ranks_per_copy)
    samples = read_samples(recipe, teacher, sharded, "heldout", recipe.probe.batch_size, 0, 1, device)
    _, first = next(samples)
    unused = unread_streams(sharded, teacher, first)
    accelerator = get_accelerator()
    accelerator.reset_peak_memory_stats()
    before = accelerator.memory_allocated()
    capture = read_teacher(sharded, teacher, first)
    taken = accelerator.max_memory_allocated() - before if accelerator.device_name() != "cpu" else 0
    lanes = lanes_of(teacher.anatomy, capture, unused)
    boundaries = [sum(stream.nbytes for stream in streams.values()) for streams in capture.streams.values()]
    at_work = max(0, taken - sum(boundaries))
    return Reader(recipe, teacher, sharded, lanes, unused, max(boundaries), at_work, device)
