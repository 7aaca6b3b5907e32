"""`ppcl distill` under a compiler of your choice: `python -m tests.training.compiling distill RECIPE`.

`BACKEND` is torch.compile's, or `none`, which refuses everything. Each rank leaves what was compiled in `COUNTED/RANK`:
`graphs`, and, of inductor, element by element operations before (`nodes`) and after (`kernels`) they were fused.
"""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from ppcl_ds.cli import main
from ppcl_ds.units import compiled


def refuses(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("an operation that nobody has heard of")


def count() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    found = {
        "graphs": counters["stats"]["unique_graphs"],
        "kernels": metrics.generated_kernel_count,
        "nodes": metrics.ir_nodes_pre_fusion,
    }
    (Path(os.environ["COUNTED"]) / os.environ["RANK"]).write_text(json.dumps(found))


if __name__ == "__main__":
    named = os.environ["BACKEND"]
    compiled.BACKEND = refuses if named == "none" else named  # type: ignore[assignment]
    if "RANK" in os.environ:
        atexit.register(count)
    main()
