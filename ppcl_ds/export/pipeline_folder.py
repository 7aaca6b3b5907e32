"""A whole pipeline folder around a pruned transformer: the teacher's other components, without copying them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ppcl_ds.atomic import atomic_folder, disk_errors_as_one_line, require_space
from ppcl_ds.errors import UserError
from ppcl_ds.export.model_folder import CARD, FACTS, SUMS, write_model, write_sums
from ppcl_ds.teacher.pipeline_files import INDEX, read_index
from ppcl_ds.units.variant import Layout

_OURS = (INDEX, CARD, FACTS, SUMS)
"""What an export writes itself; if the teacher is one, it has them, too."""
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".gguf", ".pt", ".pth")
"""At a pipeline's root these are its models once more, for other tools."""


def pipeline_files(pipeline: Path, component: str = "transformer") -> dict[str, Path]:
    """All files of a diffusers pipeline but its transformer's and its index: name in the folder -> the real file.

    Args:
        pipeline: a folder with `model_index.json`; as in a download cache, its files may be symbolic links.
        component: the transformer.

    Raises:
        UserError: the index cannot be read.
    """
    components = {name for name, value in read_index(pipeline).items() if isinstance(value, list)}
    found = [
        file
        for file in pipeline.iterdir()
        if file.is_file() and file.name not in _OURS and file.suffix not in _WEIGHTS and file.name[0] != "."
    ]
    for name in components - {component}:
        found += [file for file in (pipeline / name).rglob("*") if file.is_file()]
    return {file.relative_to(pipeline).as_posix(): file.resolve() for file in sorted(found)}


def pipeline_class(pipeline: Path) -> tuple[str | None, str]:
    """Class of a diffusers pipeline, and the module in the folder that has it; None: diffusers has it.

    Raises:
        UserError: the index cannot be read.
    """
    named = read_index(pipeline)["_class_name"]
    module, name = named if isinstance(named, list) else (None, named)
    return module, str(name)


def name_transformer(folder: Path, pipeline: Path, component: str, library: str, class_name: str) -> None:
    """Write a pipeline's index, in which the transformer is another class.

    Args:
        folder: is given the index.
        pipeline: whose index it is otherwise.
        library: `diffusers`, or a module in the transformer's folder.
    """
    index = read_index(pipeline) | {component: [library, class_name]}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copied_bytes(files: dict[str, Path], out: Path) -> int:
    """Bytes that `place` will have to copy, because they lie on another disk than `out`."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    device = existing.stat().st_dev
    return sum(stat.st_size for stat in map(Path.stat, files.values()) if stat.st_dev != device)


def place(files: dict[str, Path], folder: Path) -> None:
    """Give a folder the pipeline's files: the same file under a second name where the disk allows, else a copy."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source, target)


def require_new(out: Path) -> None:
    """Refuse to write an imported model over something.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; give a new folder")


def write_pipeline(model: Layout, base: Path, library: str, out: Path, max_shard_size: int) -> None:
    """Write an imported transformer, and what stands around it in its base, with checksums; whole or not at all.

    Args:
        base: folder of a pipeline, whose other components come along, or of a transformer alone.
        library: where the transformer's class is, see `name_transformer`.
        max_shard_size: bytes of a weights file.

    Raises:
        UserError: it cannot be written.
    """
    around = pipeline_files(base) if (base / INDEX).exists() else {}
    require_space(out, model.bytes + copied_bytes(around, out))
    with disk_errors_as_one_line(out), atomic_folder(out) as folder:
        place(around, folder)
        write_model(model, folder / "transformer", max_shard_size)
        if around:
            name_transformer(folder, base, "transformer", library, model.config["_class_name"])
        write_sums(folder)
