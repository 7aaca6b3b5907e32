"""Webdataset shards by pattern or address, as files on this machine."""

from __future__ import annotations

import glob
import hashlib
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from webdataset.shardlists import expand_urls

from data_tools.work import spread
from ppcl_ds.console import Advance
from ppcl_ds.data.shards import WAITS, fetch
from ppcl_ds.errors import UserError, brief

REMOTE = re.compile(r"(pipe:|\w+://)")
"""How an address begins."""


def shard_files(source: str, fetched: Path, workers: int = 1) -> list[tuple[str, Path]]:
    """Webdataset shards by name and where they lie on this machine.

    Args:
        source: a brace pattern of local files, a local `*` pattern, `http(s)://...` or `pipe:...`.
        fetched: a folder for remote ones; what lies there already is not fetched again.
        workers: processes that fetch.

    Raises:
        UserError: one is not there, or cannot be fetched after some tries.
    """
    try:
        urls = expand_urls(source)
    except ValueError as fault:
        raise UserError(f"{source}: {brief(fault)}") from None
    if not any(REMOTE.match(url) for url in urls):
        paths = [
            Path(match) for url in urls for match in ([url] if Path(url).exists() else sorted(glob.glob(url)) or [url])
        ]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no such file; `{source}` must name shards that are there")
        return [(str(path), path) for path in paths]
    fetched.mkdir(parents=True, exist_ok=True)
    jobs = [_Fetch(url, fetched / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar") for url in urls]
    spread(_fetch, jobs, "fetching shards", workers)
    return [(job.url, job.path) for job in jobs]


def shard_name(source: str) -> str:
    """The file name of a shard, also in an address or a command."""
    names = re.findall(r"[^\s/'\"=?&]+\.tar\b", source)
    return names[-1] if REMOTE.match(source) and names else Path(source).name


@dataclass(frozen=True)
class _Fetch:
    url: str
    path: Path
    samples: int = 1

    @property
    def key(self) -> str:
        return self.url


class _Fetched(BaseModel):
    pass


def _fetch(job: _Fetch, advance: Advance) -> _Fetched:
    for wait in (*WAITS, None):
        if job.path.exists():
            break
        try:
            fetch(job.url, job.path.with_suffix(".new"))
            os.replace(job.path.with_suffix(".new"), job.path)
        except (OSError, ValueError) as fault:
            if wait is None:
                why = brief(fault)
                raise UserError(f"{job.url}: cannot be fetched after {len(WAITS) + 1} tries ({why})") from None
            time.sleep(wait * random.uniform(0.5, 1.5))
    advance(1)
    return _Fetched()
