"""What a run shows of itself while it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.flops import measure_work
from ppcl_ds.training.log import Log
from ppcl_ds.watch.tensorboard import TensorBoard, read_scalars
from tests.conftest import command
from tests.data.shards import rewrite
from tests.plans import three_spans

PLAN = three_spans()


def test_a_run_shows_its_speed_by_phase_its_memory_and_every_unit(new_run: Callable[..., Path]) -> None:
    settings = {"steps": 4, "log_every": 2, "checkpoint_every": 2, "sample_every": 2}
    path = new_run("qwen", distill=settings, data={"workers": 1})
    recipe = load_recipe(path)
    PLAN.save(recipe.plan_file)
    spoilt: list[str] = []

    def spoil(name: str, data: bytes) -> tuple[str, bytes]:
        if name.endswith(".safetensors") and not spoilt:
            spoilt.append(name.removesuffix(".safetensors"))
            data = bytes(len(data))
        return name, data

    rewrite(recipe.data.shards / "encoded" / "train-000001.tar", spoil)
    printed = command("distill", path)

    scalars = read_scalars(recipe.distillation.board)
    phases = ["data", "teacher", "exchange", "students", "checkpoint", "preview"]
    names = [f"seconds/{phase}" for phase in phases]
    names += [f"run/{what}" for what in ("loss", "learning_rate", "samples_per_second", "flops_per_second")]
    names += ["data/bad_samples", "run/share_of_peak", "memory_gib/rank_0", "memory_gib/rank_1"]
    for unit in PLAN.units:
        names += [f"{unit.name}/{what}/{stream}" for what in ("loss", "norm_ratio") for stream in unit.streams]
        names += [f"{unit.name}/gradient_norm", f"{unit.name}/skipped_steps"]
    levels = ["", *(f"/{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9))]
    for variant in PLAN.variants:
        names += [f"heldout/{figure}/{variant}" for figure in ("velocity_mse", "short_mse")]
        names += [f"heldout/guided_mse/{variant}{level}" for level in levels]
    assert scalars.keys() == set(names)
    assert all(value >= 0 for points in scalars.values() for _, value in points)

    # 64 samples are read, 48 there are: one rank or both have met it.
    lines = recipe.bad_samples.read_text().splitlines()
    assert {line.split(": ")[0] for line in lines} == {f"train-000001.tar:{spoilt[0]}"}
    assert scalars["data/bad_samples"][-1][1] == 1, "though both ranks may have met it"
    assert f"bad samples that were skipped: 1; {recipe.bad_samples} names them" in printed

    teacher = open_teacher(recipe)
    samples = recipe.distill.micro_batch * recipe.distill.micro_batches_per_step
    work = measure_work(teacher, PLAN, Size(8, 8)).per_step(samples, False)
    at_the_end = {name: points[-1][1] for name, points in scalars.items()}
    per_step = sum(at_the_end[f"seconds/{phase}"] for phase in phases[:4])
    assert at_the_end["run/samples_per_second"] * per_step == pytest.approx(samples, rel=0.2)  # means of two ranks
    flops = at_the_end["run/flops_per_second"] / at_the_end["run/samples_per_second"] * samples
    assert flops == pytest.approx(work, rel=1e-4)
    assert 0 < at_the_end["run/share_of_peak"] < 1
    for words in ("samples/s", "s a step", "teacher ", "TFLOP/s", "GiB", "norm ratio", *(u.name for u in PLAN.units)):
        assert words in printed


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_unit_that_skips_steps_is_named_when_it_does(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(
        tmp_path,
        done=0,
        samples=8,
        flops=1e12,
        matrix_rate=1e12,
        skipped={},
        total=lambda values: values["early/loss/image"],
    )
    own = {"memory_gib/rank_0": 1.0, "early/loss/image": 0.5, "middle/loss/image": math.nan}
    for step, skipped in ((3, 0), (4, 1), (5, 1), (9, 4)):
        counts = {"early/skipped_steps": 0.0, "middle/skipped_steps": float(skipped)}
        line = log.write(step, own | counts, {"students": 2.0}, steps=2)
        assert line.startswith("loss 0.5000, 8 samples/s, 1 s a step (students 100%), 1 TFLOP/s (100%")
    assert capsys.readouterr().out.splitlines() == [
        "'middle': gradients not finite; it has skipped 1 of 4 steps",
        "'middle': gradients not finite; it has skipped 4 of 9 steps",
    ]
    assert [value for _, value in read_scalars(tmp_path)["run/loss"]] == [0.5] * 4
    log.write(11, own | {"middle/skipped_steps": 6.0}, {"students": 2.0}, steps=2)
    with pytest.raises(UserError, match="'middle' has skipped every step of 3 logs, 8 of 13 in all"):
        log.write(13, own | {"middle/skipped_steps": 8.0}, {"students": 2.0}, steps=2)


def test_a_start_takes_back_what_comes_after_its_checkpoint(alone: None, tmp_path: Path) -> None:
    """By TensorBoard's own reader: of steps that are trained again, the later value alone is there."""
    for first, steps in ((1, range(1, 9)), (5, range(5, 7))):
        board = TensorBoard(tmp_path, first)
        for step in steps:
            board.scalars(step, {"run/loss": first + step / 10})
        del board
        time.sleep(1)  # TensorBoard reads files in the order of their names, which tell starts apart by the second
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, round(event.value, 1)) for event in events.Scalars("run/loss")]
    assert found == [(1, 1.1), (2, 1.2), (3, 1.3), (4, 1.4), (5, 5.5), (6, 5.6)]
