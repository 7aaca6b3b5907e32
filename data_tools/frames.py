"""Folders whose files are numbered images: the frames of a clip, in order."""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_tools.found import Piece, piece_of
from ppcl_ds.data.clips import FRAME
from ppcl_ds.data.index import IMAGE_SUFFIXES
from ppcl_ds.errors import shown


def is_clip(folder: Path) -> bool:
    """Whether a folder that has a caption holds frames: an image, and none with a caption of its own."""
    try:
        kinds = {os.path.splitext(name)[1].lower().lstrip(".") for name in _names(folder)}
    except OSError:  # most often, no folder
        return False
    return bool(kinds & set(IMAGE_SUFFIXES)) and not kinds & {"txt", "json"}


def frames_in(folder: Path) -> dict[str, Piece]:
    """The frames of a clip in the order of their numbers, under the names by which `Found` packs them.

    Raises:
        ValueError: something else lies there, or a number is there twice.
        OSError: the folder cannot be read.
    """
    numbered: dict[int, str] = {}
    for name in _names(folder):
        stem, suffix = os.path.splitext(name)
        number = re.search(r"\d+$", stem)
        if suffix.lower().lstrip(".") not in IMAGE_SUFFIXES or not number:
            raise ValueError(f"it is a folder of frames, but {shown(name)} in it is no numbered image")
        if other := numbered.get(int(number[0])):
            raise ValueError(f"its frames {shown(other)} and {shown(name)} have one number")
        numbered[int(number[0])] = name
    if not numbered:
        raise ValueError("it is a folder without images")
    return {FRAME + name: piece_of(folder / name) for _, name in sorted(numbered.items())}


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
