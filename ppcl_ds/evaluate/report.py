"""What an evaluation leaves: report.json, samples.png, and the first pictures of every model one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ppcl_ds.atomic import atomic_folder, atomic_write
from ppcl_ds.errors import UserError, brief
from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.pages import as_png

_COLUMNS = 16
"""Images of each model in samples.png."""
_FOLDER, _CAPTIONS = "samples", "captions.json"


class Figures(BaseModel):
    """The content of report.json; `facts` are lines that say what was measured, name -> text."""

    models: Sequence[ModelFigures]
    sets: Sequence[SetFigures] = ()
    facts: Mapping[str, str] = {}


def draw_samples(images: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """One row of images a model, the same noise down each column.

    Args:
        images: name -> (N, C, H, W) in [-1, 1].
        captions: N prompts; written above the columns.
    """
    columns = min(_COLUMNS, len(captions))
    figure, axes = plt.subplots(
        len(images), columns, figsize=(0.75 * columns + 1.6, 0.85 * len(images) + 0.3), squeeze=False
    )
    for row, (name, drawn) in zip(axes, images.items(), strict=True):
        for axis, image in zip(row, drawn[:columns], strict=True):
            grey = image.shape[0] == 1
            axis.imshow(image.permute(1, 2, 0).clamp(-1, 1) * 0.5 + 0.5, cmap="gray" if grey else None, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title("\n".join(caption.split()[-2:]), fontsize=6)
    figure.tight_layout(pad=0.3)
    atomic_write(path, as_png(figure))


def save_pictures(images: Mapping[str, Tensor], captions: Sequence[str], run: Path) -> None:
    """Write the pictures of `samples.png` one by one, as large as they are: `samples/MODEL/00.png`, and their prompts.

    Args:
        images: name -> (N, C, H, W) in [-1, 1].
        captions: N prompts.
    """
    with atomic_folder(run / _FOLDER) as folder:
        for name, drawn in images.items():
            (folder / name).mkdir()
            for number, image in enumerate(drawn[:_COLUMNS]):
                pixels = (image.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).squeeze(-1)
                Image.fromarray(pixels.numpy()).save(folder / name / f"{number:02d}.png")
        (folder / _CAPTIONS).write_text(json.dumps(list(captions[:_COLUMNS]), ensure_ascii=False))


@dataclass(frozen=True)
class Pictures:
    """Pictures of every model, the same noise and prompt at each place.

    Attributes:
        files: model -> paths.
    """

    captions: Sequence[str]
    files: Mapping[str, Sequence[Path]]


def read_pictures(run: Path) -> Pictures:
    """What `save_pictures` wrote; nothing where there is none."""
    folder = run / _FOLDER
    try:
        captions = TypeAdapter(list[str]).validate_json((folder / _CAPTIONS).read_bytes())
    except (OSError, ValidationError):
        return Pictures((), {})
    return Pictures(captions, {each.name: sorted(each.glob("*.png")) for each in folder.iterdir() if each.is_dir()})


def read_report(path: Path) -> Figures:
    """What `report.json` says.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return Figures.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as fault:
        raise UserError(f"{path} cannot be read ({brief(fault)}); run `ppcl evaluate RECIPE` first") from None


def show_sets(sets: Sequence[SetFigures]) -> None:
    """Print a table a prompt set: scores of every model, and what they say of variants."""
    for each in sets:
        models = list(dict.fromkeys(name for score in each.scores for name in score.values))
        table = Table("model", *(escape(score.score) for score in each.scores), box=SIMPLE, title=escape(each.name))
        for model in models:
            cells = []
            for score in each.scores:
                cell = f"{score.values[model]:.4g}" if model in score.values else "-"
                difference = score.differences.get(model)
                cells.append(f"{cell} {difference.verdict}" if difference else cell)
            table.add_row(escape(model), *cells)
        Console().print(table)
