"""A look at a variant while it is fine-tuned: held-out losses by noise level, and images beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ppcl_ds.finetune.pipeline import VariantEngine
from ppcl_ds.teacher.noising import place_quantiles
from ppcl_ds.teacher.sharded import Loaded
from ppcl_ds.teacher.teacher import forward
from ppcl_ds.training.preview import Means, Preview, Turn


def look(
    preview: Preview,
    quantiles: Sequence[float],
    sharded: Loaded,
    engine: VariantEngine,
    draws: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Held-out losses and images; the same samples and noise every time. Collective over all ranks.

    Every replica looks at samples of its own; the teacher's images are shared over all ranks.

    Args:
        quantiles: of the noise levels that training draws.
        draws: whether there are to be images.

    Returns:
        `heldout/flow/QUANTILE` and `heldout/velocity/QUANTILE`, mean squared errors from the data's and from the
        teacher's velocity, or of captions alone `heldout/velocity/trajectories`; `heldout/guided_mse` and
        `heldout/branch_mse`, both also by noise level (`heldout/guided_mse/0.9`), and `heldout/short_mse`; and on rank
        0, `teacher` and `variant` -> images (N, C, H, W) in [-1, 1].
    """
    teacher, grid, means = preview.teacher, engine.grid, Means()
    turn = Turn(grid.get_data_parallel_rank(), grid.get_data_parallel_world_size(), speaks=engine.stage_id == 0)
    places: dict[str, Tensor | None] = {"trajectories": None}
    if preview.has_images:
        found = place_quantiles(preview.recipe.noise, quantiles)
        places = {f"{quantile:g}": place for quantile, place in zip(quantiles, found, strict=True)}
    images: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for name, place in places.items():
            for counts, batch in preview.noisy(sharded, turn, place):
                true = teacher.answer(sharded, batch).float()
                own = teacher.call.stepped_by(engine.output(batch.arguments, batch.size), batch.size).float()
                if preview.has_images:
                    means.add(f"heldout/flow/{name}", counts, (own - batch.target.to(own)).square().mean())
                means.add(f"heldout/velocity/{name}", counts, (own - true).square().mean())
        for piece in preview.pieces(sharded, turn):
            true_says = piece.says(partial(forward, sharded))
            means.add_errors("", piece, piece.says(partial(engine.output, size=piece.size)), true_says)
        if draws:
            size = preview.samples[0].size
            images["teacher"] = preview.draw(partial(forward, sharded), Turn.of_rank())
            images["variant"] = preview.draw(partial(engine.output, size=size), turn)
    return means.take(), {name: drawn for name, drawn in images.items() if drawn is not None}
