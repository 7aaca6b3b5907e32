"""`ppcl estimate`: what a run will need, before anybody queues for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import accelerator_called
from ppcl_ds.estimate.show import show, show_tuning
from ppcl_ds.estimate.sizing import Sized, size_run
from ppcl_ds.estimate.tuning import size_tuning
from ppcl_ds.recipe import Recipe


def estimate(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int | None = None,
    *,
    accelerator: str = "h100",
    utilisation: float = 0.4,
    latent_size: str | None = None,
    text_tokens: int | None = None,
    variant: str | None = None,
    json: Path | None = None,
) -> bool:
    """Print the estimate, and write it to `json` if given.

    Args:
        variant: that is to be fine-tuned; None: distilling is estimated.
        gpus_per_node: all processes of the recipe's topology by default.
        latent_size: as on the command line, see `read_size`.

    Returns:
        Whether the run fits.

    Raises:
        UserError: an argument is wrong, or recipe, plan and teacher do not go together.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: give a share of the peak, more than 0 and at most 1")
    if text_tokens is not None and text_tokens < 1:
        raise UserError(f"--text-tokens {text_tokens}: a prompt has a token or more")
    cluster = nodes, recipe.topology.world if gpus_per_node is None else gpus_per_node, accelerator_called(accelerator)
    size = None if latent_size is None else read_size(latent_size)
    options: Any = {"utilisation": utilisation, "latent_size": size, "text_tokens": text_tokens}
    numbers: Sized
    if variant is None:
        show(numbers := size_run(recipe, *cluster, **options))
    else:
        show_tuning(numbers := size_tuning(recipe, recipe.tuning, variant, *cluster, **options))
    if json is not None:
        try:
            atomic_write(json, numbers.model_dump_json(indent=1) + "\n")
        except OSError as fault:
            raise UserError(f"--json {json}: {fault.strerror}") from None
    return numbers.fits


def read_size(text: str) -> tuple[int, int]:
    """`128` or `96x160` -> (H, W) of the latents.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise UserError(f"--latent-size {text}: give one number, or height and width such as 96x160")
    height, width = found.groups()
    return int(height), int(width or height)
