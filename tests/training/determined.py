"""`ppcl` whose ranks note in `NOTED` how they compute: `python -m tests.training.determined COMMAND RECIPE`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ppcl_ds.cli import main
from ppcl_ds.training import trainer

load = trainer.load_teacher


def noted(*arguments: Any) -> Any:
    note = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    (Path(os.environ["NOTED"]) / os.environ["RANK"]).write_text(json.dumps(note))
    return load(*arguments)


if __name__ == "__main__":
    trainer.load_teacher = noted  # type: ignore[assignment]
    main()
