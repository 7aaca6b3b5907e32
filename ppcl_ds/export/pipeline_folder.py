"""A whole pipeline folder around a pruned transformer: the teacher's other components, without copying them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppcl_ds.errors import UserError

INDEX = "model_index.json"


def pipeline_files(pipeline: Path) -> dict[str, Path]:
    """All files of a diffusers pipeline but its transformer's: name in the folder -> the real file behind it.

    Args:
        pipeline: a folder with `model_index.json`; as in a download cache, its files may be symbolic links.

    Raises:
        UserError: the index cannot be read.
    """
    index = _index(pipeline)
    components = [name for name, value in index.items() if isinstance(value, list) and name != "transformer"]
    found = {INDEX: (pipeline / INDEX).resolve()}
    for component in components:
        found |= {file.relative_to(pipeline).as_posix(): file.resolve() for file in _files(pipeline / component)}
    return found


def pipeline_class(pipeline: Path) -> str:
    """Class of a diffusers pipeline.

    Raises:
        UserError: the index cannot be read.
    """
    return str(_index(pipeline).get("_class_name"))


def name_transformer(folder: Path, module: str, class_name: str) -> None:
    """Have a pipeline's index say that its transformer is a class of a module in the transformer's own folder."""
    index = _index(folder)
    index["transformer"] = [module, class_name]
    (folder / INDEX).unlink()  # it may be the teacher's own file
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _index(pipeline: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((pipeline / INDEX).read_text()))
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"teacher {pipeline}: {INDEX} cannot be read ({fault}); copy it again") from None


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


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
