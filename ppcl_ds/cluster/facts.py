"""What the sbatch scripts need to know of a recipe, a line each: run folder, processes, how many requeues."""

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
    print(recipe.run, recipe.topology.world, recipe.cluster.requeues, sep="\n")
