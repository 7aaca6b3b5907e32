"""Runs of the pretended accelerator as tests and benchmarks ask for them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.estimate.measured import account_of, run_once
from ppcl_ds.estimate.numbers import Memory, add_up
from tests.pretend.cases import Case
from tests.pretend.replay import Call, Group
from tests.ranks import Done, run

_AT_ONCE = 2
"""Ranks that run at the same time; they know nothing of each other."""


@dataclass(frozen=True)
class Observed:
    """What one rank saw.

    Attributes:
        notes: `built`, `step`, `look` and so on -> what `device.Seen` counted meanwhile, `gathered`, and bytes `now`
            and at the `peak`.
    """

    notes: dict[str, Any]

    @property
    def calls(self) -> list[Call]:
        return [(what, tuple(ranks), agreed) for what, ranks, agreed in self.notes["calls"]]

    @property
    def groups(self) -> list[Group]:
        return [(backend, tuple(ranks), local) for backend, ranks, local in self.notes["groups"]]

    def waits(self, during: str = "step") -> dict[str, int]:
        """Place -> times that the host waited for the device."""
        return dict(self.notes[during]["waits"])

    def ahead(self, during: str = "step") -> float:
        """The share of gathered bytes (copied ones, of a lone rank) asked for before the block that needs them."""
        gathered = self.notes[during]["gathered"] or self.notes[during]["fetched"]
        ahead, late = gathered.get("ahead", 0), gathered.get("late", 0)
        return ahead / (ahead + late)


def run_rank(case: Case, folder: Path) -> Done:
    """The rank of a case whose files are in `folder`, in a process of its own."""
    return run("tests.pretend.rank", case.written(), folder)


@lru_cache
def observe(case: Case, ranks: tuple[int, ...] | None = None) -> Sequence[Observed]:
    """What ranks of a run saw.

    Args:
        ranks: all by default.
    """
    ranks = tuple(range(case.world)) if ranks is None else ranks
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(_AT_ONCE) as pool:
        folder = Path(name) / "run"
        case.write(folder)
        ended = pool.map(lambda rank: run_rank(replace(case, rank=rank), folder), ranks)
        for done in ended:
            assert done.returncode == 0, done.stdout + done.stderr
        return [Observed(json.loads((folder / f"seen-{rank}.json").read_text())) for rank in ranks]


def estimated(case: Case) -> list[Memory]:
    """For each stage, the memory that `ppcl estimate` gives."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        recipe = case.write(folder)
        per_node = min(case.ranks_per_node, case.world)
        variant = "small" if case.what == "finetune" else None
        inputs = read_inputs(recipe, case.world // per_node, per_node, variant)
        forward = run_once(inputs)
        account = account_of(inputs, forward)
        return [add_up(stage) for stage in account.phases(inputs.cluster)]


def peaks(memory: Memory) -> dict[str, int]:
    """`step` and `look` -> the peak that an estimate gives for it, without a VAE, as none is loaded here."""
    kept, phases = sum(memory.resident.values()), dict(memory.phases)
    found = {}
    if look := phases.pop("look", None):
        found["look"] = kept + sum(size for part, size in look.items() if part != "VAE")
    return found | {"step": kept + max(sum(parts.values()) for parts in phases.values())}


def estimated_peaks(case: Case) -> list[int]:
    """For each stage, that of a step."""
    return [peaks(memory)["step"] for memory in estimated(case)]
