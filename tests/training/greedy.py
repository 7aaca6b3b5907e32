"""`ppcl` of which one rank asks for more memory than there is: `python -m tests.training.greedy COMMAND RECIPE ...`.

`GREEDY=RANK:MODULE:NAME` has that rank do so when it calls NAME of the module, as torch's own allocator refuses it.
"""

from __future__ import annotations

import importlib
import os
from functools import reduce
from typing import Any

import torch

from ppcl_ds.cli import main

RANK, MODULE, NAME = os.environ["GREEDY"].split(":")


def asks_for_too_much(*_: Any, **__: Any) -> Any:
    return torch.empty(2**60)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == RANK:
        *path, last = NAME.split(".")
        setattr(reduce(getattr, path, importlib.import_module(MODULE)), last, asks_for_too_much)
    main()
