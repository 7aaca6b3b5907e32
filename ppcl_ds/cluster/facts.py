"""What the sbatch scripts need to know, a line each: run folder, processes, requeues, processes that evaluate."""

from __future__ import annotations

import sys
from pathlib import Path

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe

if __name__ == "__main__":
    try:
        recipe = load_recipe(Path(sys.argv[1]))
    except UserError as fault:
        sys.exit(f"error: {fault}")
    drawing = recipe.topology.world if recipe.evaluate.sets else 1
    print(recipe.run, recipe.topology.world, recipe.cluster.requeues, drawing, sep="\n")
