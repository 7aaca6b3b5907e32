"""A rank that probes a teacher at once, in ranges of blocks, and in parts that are merged: one report, three times.

torchrun ... -m tests.probing.parts_on_ranks RECIPE
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from ppcl_ds import launch
from ppcl_ds.probing.part_files import Part
from ppcl_ds.probing.probe import check, merge_parts, open_reader, report_all, sum_part
from ppcl_ds.recipe import load_recipe


def main(path: Path) -> None:
    """Leave `whole`, `ranged` and `probe` (of the parts) in the run folder."""
    recipe = load_recipe(path)
    teacher = check(recipe)
    reader = open_reader(recipe, teacher, launch.join())

    def keep(name: str) -> None:
        if dist.get_rank() == 0:
            shutil.copytree(recipe.probe_folder, recipe.run / name)

    report_all(reader)
    keep("whole")
    probe = recipe.probe.model_copy(update={"blocks_at_once": 2})
    reader.recipe = recipe.model_copy(update={"probe": probe})
    report_all(reader)
    keep("ranged")
    for index in (3, 1, 2, 1):  # in any order, and one of them again
        sum_part(reader, Part(index, 3))
    if dist.get_rank() == 0:
        merge_parts(recipe, teacher)
    launch.leave()
    launch.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
