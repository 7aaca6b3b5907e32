"""Images that ranks have drawn come to the first one as they were, however they lie in memory.

Run as a module, this file is one of the ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.training.preview import on_first_rank
from tests.ranks import run_ranks

COUNTS = [2, 0, 3]
"""Images of each rank."""


def drawn(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(256, (COUNTS[rank], 3, 6, 4), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_images_come_to_the_first_rank(tmp_path: Path, layout: str) -> None:
    run_ranks("tests.training.test_preview", tmp_path / "found.pt", layout, world=len(COUNTS))
    assert torch.equal(torch.load(tmp_path / "found.pt"), torch.cat([drawn(rank) for rank in range(len(COUNTS))]))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = drawn(dist.get_rank()).to(memory_format=getattr(torch, sys.argv[2]))
    found = on_first_rank(own.split(1) if len(own) else [], dist.group.WORLD)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
