"""The ranks of `ppcl probe`: the sharded teacher reads calibration micro-batches, rank 0 writes the report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import torch.distributed as dist

from ppcl_ds import launch
from ppcl_ds.data.index import split_entries
from ppcl_ds.data.stream import empty_prompt
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.call import caller_for
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import DTYPES, NoisyBatch, NoisyStream, open_teacher, read_teacher, unread_streams
from ppcl_ds.probing.probe import Prober, Reading
from ppcl_ds.recipe import Recipe, read_deepspeed_file


def check(recipe: Recipe) -> tuple[ModelFiles, Anatomy]:
    """Everything that can be wrong before a process starts.

    Raises:
        UserError: one line that says what.
    """
    files, anatomy = open_teacher(recipe)
    launch.check_world(recipe.topology.world)
    for split in ("train", "heldout"):
        split_entries(recipe.data, split)
    empty_prompt(recipe.data)
    read_deepspeed_file(recipe.deepspeed.teacher)
    return files, anatomy


def probe(recipe: Recipe, files: ModelFiles, anatomy: Anatomy) -> None:
    """Probe the teacher; every rank must call this.

    Calibration takes the first `batches` micro-batches of the training data, measuring the next ones.
    """
    device = launch.join()
    # DeepSpeed is imported by ranks only: it takes seconds and looks for accelerators.
    from ppcl_ds.families.sharded import load_teacher

    caller = caller_for(files.class_name)
    config = read_deepspeed_file(recipe.deepspeed.teacher)
    teacher = load_teacher(files, config, DTYPES[recipe.teacher.precision], recipe.teacher.ranks_per_copy)
    rank, world = dist.get_rank(), dist.get_world_size()
    # Every rank runs the sharded teacher equally often, so the number of batches is rounded up to the ranks.
    share = -(-recipe.probe.batches // world)
    batches = NoisyStream(recipe, "train", recipe.probe.batch_size, device).take(rank, world)
    [(_, first)] = islice(NoisyStream(recipe, "heldout", recipe.probe.batch_size, device).take(0, 1), 1)
    unused = unread_streams(teacher, anatomy, caller, first)

    def captures(stream: Iterator[tuple[int, NoisyBatch]]) -> Iterator[Reading]:
        for _, batch in islice(stream, share):
            yield read_teacher(teacher, anatomy, caller, batch), batch.prompts.mask

    prober = Prober(anatomy, unused, recipe.probe.ridge, device)
    prober.fit(captures(batches), share)
    prober.measure(captures(batches), share)
    if rank == 0:
        for name in sorted(anatomy.guessed):
            logging.warning("diffusers' registry misnames the streams of %s; its signature decided", name)
        report = prober.report(files.class_name)
        report.save(recipe.probe_folder)
    launch.leave()
