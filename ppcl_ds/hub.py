"""Ids of the Hugging Face hub in the place of folders: what they stand for is in its cache, or is fetched."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ppcl_ds.errors import UserError, brief, missing, shown

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)[.-]")
"""Weights in another dtype, beside those that diffusers loads unless told."""
_SECONDS = 10.0
"""That the hub may take to say what it has."""

Kind = Literal["model", "dataset"]


class _UnansweredError(UserError):
    """The hub could not be asked."""


def is_id(path: str | Path) -> bool:
    """Whether this is no path of something here, but could be `OWNER/NAME` on the hub."""
    text = str(path)
    return bool(_ID.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.exists()


def pipeline_folder(path: Path) -> Path:
    """The folder of a pipeline: the path itself if it is there, else the snapshot of the id that it is.

    Of a repository, only what the pipeline is made of is fetched: the components that `model_index.json` names, their
    weights as safetensors where there are some; and its card and licence.

    Raises:
        UserError: there is neither such a folder nor such a repository, or the hub cannot be reached.
    """
    if path.exists():
        return path
    if not is_id(path):
        raise UserError(f"teacher {missing(path)}")
    return _snapshot(str(path))


@lru_cache
def _snapshot(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model_index.json")
    if isinstance(cached, str) and _is_whole(Path(cached).parent):
        return Path(cached).parent

    def needed(files: Collection[str]) -> list[str]:
        if "model_index.json" not in files:
            raise UserError(f"{name}: the hub's repository has no model_index.json; name one of a diffusers pipeline")
        return _of_pipeline(files, Path(hf_hub_download(name, "model_index.json")))

    return _fetch(name, "model", needed)


def data_folder(name: str, suffixes: Collection[str]) -> Path:
    """The folder of a data set on the hub, of which only files with these endings are fetched.

    Raises:
        UserError: there is no such data set, or the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _fetch(name, "dataset", lambda files: [file for file in files if file.lower().endswith(tuple(suffixes))])
    except _UnansweredError as fault:
        patterns = [f"*{suffix}" for each in suffixes for suffix in (each, each.upper())]
        try:
            return Path(snapshot_download(name, repo_type="dataset", local_files_only=True, allow_patterns=patterns))
        except (LocalEntryNotFoundError, OSError, ValueError):
            raise fault from None


def _components(index: Path) -> list[str]:
    try:
        listed = dict(json.loads(index.read_text()))
    except (OSError, ValueError, TypeError):
        return []
    return [key for key, value in listed.items() if isinstance(value, list) and value != [None, None]]


def _of_pipeline(files: Collection[str], index: Path) -> list[str]:
    """The files that a pipeline is made of."""
    found = [file for file in files if re.fullmatch(r"model_index\.json|README\.md|LICEN[SC]E.*", file)]
    for component in _components(index):
        own = [file for file in files if file.startswith(f"{component}/") and not _VARIANT.search(file)]
        best = next((kind for kind in _WEIGHTS if any(file.endswith(kind) for file in own)), "")
        found += [file for file in own if not file.endswith(_WEIGHTS) or file.endswith(best)]
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has every component, and every weights file that an index names."""
    components = _components(folder / "model_index.json")
    for component in (folder / name for name in components if name != "_class_name"):
        if not component.is_dir():
            return False
        names = {file.name for file in component.iterdir() if file.exists()}  # a link may lead nowhere
        for index in component.glob("*.safetensors.index.json"):
            if not names.issuperset(json.loads(index.read_text())["weight_map"].values()):
                return False
        if "config.json" in names and not any(name.endswith(_WEIGHTS) for name in names):
            return False
    return bool(components)


def _fetch(name: str, kind: Kind, needed: Callable[[Collection[str]], list[str]]) -> Path:
    """Everything of a repository that is needed, in the cache; asked for once, and not again if nobody answers."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        found: Any = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=_SECONDS)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        wanted = needed(sizes)
        if not wanted:
            raise UserError(f"{name}: the hub's {kind} has none of the files that are read here")
        gigabytes = sum(sizes[file] for file in wanted) / 1e9
        print(f"{name}: {gigabytes:.3g} GB of the Hugging Face hub, or its cache ...", file=sys.stderr, flush=True)
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as fault:  # of requests or of httpx, by the release of the client
        answered = getattr(fault, "response", None) is not None
        raise (UserError if answered else _UnansweredError)(_why(name, kind, fault)) from None


def _why(name: str, kind: Kind, fault: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what = "teacher" if kind == "model" else "data.source"
    here = f"{what} {missing(Path(name))}"
    hub = os.environ.get("HF_ENDPOINT", "the Hugging Face hub")
    if isinstance(fault, GatedRepoError):
        return f"{what} {name}: its owner on {hub} asks for consent; give it on its page, then `hf auth login`"
    if isinstance(fault, RepositoryNotFoundError):
        return f"{here}; nor has {hub} such a {kind} (a private one needs `hf auth login`)"
    option = " --repo-type dataset" if kind == "dataset" else ""
    return (
        f"{here}; it is not in the cache of {hub}, which cannot be asked ({shown(brief(fault), 160)}): copy the folder "
        f"here, or run `hf download {name}{option}` where there is a network"
    )
