"""A look at the variants while they train: held-out errors, and images beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.sharded import Loaded, forget_order
from ppcl_ds.teacher.teacher import forward
from ppcl_ds.training.preview import Means, Preview, Turn
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.plugging import borrow, plugged
from ppcl_ds.units.unit import Unit


def look(
    preview: Preview,
    plan: Plan,
    sharded: Loaded,
    units: Mapping[str, Unit],
    owner: Mapping[str, int],
    group: dist.ProcessGroup,
    draws: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Errors and images of every variant on held-out data, the same noise for all. Collective over all ranks.

    Every rank looks at samples of its own, with units that it borrows.

    Args:
        units: the units of this rank's stage.
        owner: unit name -> its stage in `group`, the pipe group.
        draws: whether there are to be images; without them it takes seconds.

    Returns:
        `heldout/velocity_mse/VARIANT`, `guided_mse`, `branch_mse` and `short_mse` likewise -> error, the middle two
        also by noise level, `heldout/guided_mse/VARIANT/0.9`; and on rank 0, model -> images (N, C, H, W) in [-1, 1].
    """
    teacher, turn, means = preview.teacher, Turn.of_rank(), Means()
    batches, pieces = list(preview.noisy(sharded, turn)), preview.pieces(sharded, turn)
    images: dict[str, Tensor | None] = {}
    reference: list[Tensor] = []
    true: list[dict[str, Tensor]] = []
    for name in ["teacher", *plan.variants]:
        wanted = () if name == "teacher" else plan.units_of(name)
        own = borrow(wanted, units, owner, group, teacher, DTYPES[preview.recipe.teacher.precision], preview.device)
        inside = nullcontext() if name == "teacher" else plugged(sharded.module, teacher.anatomy, plan, name, own)
        with inside, torch.no_grad():
            velocities = [teacher.answer(sharded, batch) for _, batch in batches]
            said = [piece.says(partial(forward, sharded)) for piece in pieces]
            images[name] = preview.draw(partial(forward, sharded), turn) if draws else None
        if name == "teacher":
            reference, true = velocities, said
        else:
            for (counts, _), velocity, other in zip(batches, velocities, reference, strict=True):
                means.add(f"heldout/velocity_mse/{name}", counts, (velocity - other).float().square().mean())
            for piece, own_says, teacher_says in zip(pieces, said, true, strict=True):
                means.add_errors(f"/{name}", piece, own_says, teacher_says)
        del own  # before the next variant's are borrowed
    forget_order(sharded)  # training's forwards end earlier
    return means.take(), {name: drawn for name, drawn in images.items() if drawn is not None}
