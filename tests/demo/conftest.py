"""The emoji testbed's packages, small and made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ppcl_ds.demo import emoji, emoji_judge
from tests.demo.emoji_packages import write_packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where they lie; the testbed reads these meanwhile."""
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder)
    cached = (emoji.drawings, emoji.captions, emoji_judge.judge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPCL_DEMO_DATA", str(folder))
        for each in cached:
            each.cache_clear()
        yield folder
    for each in cached:
        each.cache_clear()
