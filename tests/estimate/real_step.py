"""A rank that trains and writes down what its last steps computed, moved and held; run by `run_ranks`."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe import p2p
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds import launch
from ppcl_ds.estimate.activations import LiveBytes
from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.trainer import Training

COUNTED, HELD = 2, 3
"""The step whose FLOPs are counted, and the one whose memory is: the counter itself keeps tensors alive."""


class Watched:
    """A training of three steps, watched from before it is made.

    Attributes:
        seen: `flops`; bytes `sent` by the exchange and `passed_on` in the pipeline, in the last step; `resident` bytes
            after it, and the `peak` inside it.
    """

    def __init__(self, make: Callable[[], Training]) -> None:
        self.seen: dict[str, float] = {}
        self.number = 0
        self._watch(dist, "all_to_all_single", "sent", lambda receive, send, *_, **__: send.nbytes)
        self._watch(p2p, "send", "passed_on", lambda tensor, *_: tensor.nbytes * tensor.is_floating_point())
        with LiveBytes("cpu") as self.live:
            training = make()
            self.step, training.step = training.step, self._step  # type: ignore[method-assign, assignment]
            training.train()

    def _step(self, *arguments: Any) -> None:
        self.number += 1
        self.seen |= {"sent": 0, "passed_on": 0}
        if self.number == COUNTED:
            # The CPU's own attention kernel has no formula in the counter; its plain products are as many.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                self.step(*arguments)
            self.seen["flops"] = counter.get_total_flops()
        else:
            gc.collect()
            self.live.peak = self.live.now
            self.step(*arguments)
            gc.collect()
            self.seen |= {"resident": self.live.now, "peak": self.live.peak}

    def _watch(self, module: Any, name: str, what: str, size: Callable[..., int]) -> None:
        original = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.seen[what] = self.seen.get(what, 0) + size(*arguments, **options)
            return original(*arguments, **options)

        setattr(module, name, watched)


def main(recipe: str, variant: str, out: str) -> None:
    """Distill, or fine-tune a variant."""
    loaded = load_recipe(Path(recipe))
    if variant:
        from ppcl_ds.finetune.finetune import check as check_variant
        from ppcl_ds.finetune.trainer import FineTuner

        start = check_variant(loaded, variant, None)
        launch.join(loaded.tuning.timeout)
        watched = Watched(lambda: FineTuner(start))
    else:
        from ppcl_ds.distill.distill import check
        from ppcl_ds.distill.trainer import Trainer

        teacher, plan = check(loaded)
        launch.join(loaded.distill.timeout)
        watched = Watched(lambda: Trainer(loaded, plan, teacher))
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(watched.seen))
    launch.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
