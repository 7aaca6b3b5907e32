"""What an estimate says of a step is what real ranks compute, send and hold in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.recipe import load_recipe
from ppcl_ds.shipped import shipped
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import TEACHERS
from tests.estimate.real_step import HELD
from tests.export.trained import pretend_trained
from tests.ranks import run_ranks

STAGES = 2
LARGER = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": [16, 24, 24]}
"""Large enough that what is counted outweighs scalars and the like."""
TRAINING = {"distill": "unit training", "finetune": "pipeline"}


def ready(new_run: Callable[..., Path], precision: str, checkpointing: bool) -> Path:
    """FLUX with a depth unit in either list of blocks; blocks are gathered when they are needed, none ahead."""
    path = new_run("flux")
    raw = yaml.safe_load(path.read_text())
    run = Path(raw["run"])
    class_name, config = TEACHERS["flux"]
    torch.manual_seed(0)
    getattr(diffusers, class_name)(**config | LARGER).save_pretrained(run / "teacher" / "transformer")
    zero = json.loads(shipped("ds_configs/teacher_zero3.json").read_text())
    zero["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    (run / "zero3.json").write_text(json.dumps(zero))
    training: dict[str, Any] = {"steps": HELD, "micro_batch": 16, "micro_batches_per_step": 2 * STAGES}
    training |= {"activation_checkpointing": checkpointing, "checkpoint_every": 100}
    raw |= {"teacher": raw["teacher"] | {"precision": precision}, "deepspeed": {"teacher": str(run / "zero3.json")}}
    raw |= {"topology": {"stages": STAGES}, "distill": training, "finetune": training | {"boundary_weight": 1.0}}
    path.write_text(yaml.safe_dump(raw))
    return path


def plan() -> Plan:
    spans = {"joint": (0, 1), "single": (5, 7)}
    units = tuple(UnitPlan(name=name, span=span, streams=("image", "text")) for name, span in spans.items())
    return Plan(teacher=TEACHERS["flux"][0], blocks=9, units=units, variants={"small": tuple(spans)})


@pytest.mark.parametrize(
    ("variant", "precision", "checkpointing"),
    [("", "bf16", False), ("small", "bf16", False), ("small", "fp32", True)],
    ids=["distill", "finetune", "finetune, checkpointing"],
)
def test_a_real_step_is_what_the_estimate_says(
    new_run: Callable[..., Path], tmp_path: Path, variant: str, precision: str, checkpointing: bool
) -> None:
    path = ready(new_run, precision, checkpointing)
    if variant:
        pretend_trained(path, "flux", ranks=1, plan=plan())
    else:
        plan().save(load_recipe(path).plan_file)
    run_ranks("tests.estimate.real_step", path, variant, tmp_path, world=STAGES)
    real = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(STAGES)]

    estimate = size(read_inputs(load_recipe(path), 1, STAGES, variant=variant or None), ACCELERATORS["h100"])
    moved = {phase.name: phase.moved.intra for phase in estimate.step}
    # A first layer's input needs no gradient; the teacher has a head.
    assert sum(rank["flops"] for rank in real) == pytest.approx(estimate.step_flops, rel=0.01)
    # Each tensor of a message begins at a multiple of 16 bytes.
    assert max(rank["sent"] for rank in real) == pytest.approx(moved["exchange"], rel=0.01)
    assert max(rank["passed_on"] for rank in real) == moved.get("pipeline", 0)
    for stage, rank in zip(estimate.stages, real, strict=True):
        resident, training = sum(stage.memory.resident.values()), stage.memory.phases[TRAINING[estimate.training]]
        left = sum(training.get(part, 0) for part in ("batches", "outgoing", "inputs and targets"))
        assert resident < rank["resident"] < 1.02 * resident + left  # with what the last round has left, and scalars
        assert rank["peak"] == pytest.approx(stage.memory.peak, rel=0.05)
