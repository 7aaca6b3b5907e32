"""`ppcl estimate` answers from a recipe and a `config.json`, and refuses what cannot be answered in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, Accelerator
from ppcl_ds.estimate.estimate import estimate, read_size, size
from ppcl_ds.estimate.inputs import cluster_for, growing_clusters, read_inputs, sharding_of
from ppcl_ds.estimate.numbers import Estimate, least_time, seconds_of
from ppcl_ds.estimate.show import show
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.sections import Topology
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.phases import Phase, Sharding
from ppcl_ds.training.traffic import Cluster, Traffic
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import QWEN_IMAGE, TEACHERS, command

Unprepared = Callable[..., Path]
CAPTION = 23
"""Words of the caption that stands for usual ones."""
LARGE: dict[str, Any] = {
    "config": QWEN_IMAGE,
    "teacher": {"precision": "bf16"},
    "topology": {"stages": 8, "replicas": 4},
    "distill": {"micro_batches_per_step": 32, "micro_batch": 1},
    "plan": {"variants": {"half": 0.5}},
}


def write_plan(recipe: Path, *spans: tuple[int, int]) -> None:
    units = tuple(UnitPlan(name=f"{u}-{v}", span=(u, v), streams=("image", "text")) for u, v in spans)
    plan = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=units, variants={})
    plan.save(load_recipe(recipe).plan_file)


def test_qwen_image_is_sized_from_its_configuration_alone(unprepared: Unprepared) -> None:
    path = unprepared("qwen", **LARGE)
    began = time.monotonic()
    numbers = size(read_inputs(load_recipe(path), 4, 8, size=Size(128, 128)), ACCELERATORS["h100"])
    assert time.monotonic() - began < 60  # about six seconds on one idle core
    assert numbers.teacher_parameters == pytest.approx(20.43e9, rel=0.01)
    assert sum(len(stage.layers) for stage in numbers.stages) == 30
    assert numbers.parameters == pytest.approx(10.2e9, rel=0.01)
    assert numbers.tokens == {"image": 64 * 64, "text": CAPTION}
    resident = numbers.memory.resident
    assert resident["teacher partition"] == pytest.approx(20.43e9 * 2 / 32, rel=0.01)
    assert resident["teacher copy in the node"] == pytest.approx(20.43e9 * 2 / 8, rel=0.01)
    assert resident["units"] == pytest.approx(4 * 0.34e9 * 2, rel=0.01)
    assert numbers.fits
    assert (numbers.step[0].name, numbers.step[0].moved.inter) == ("teacher forward", 0)
    assert sum(stage.parameter_share for stage in numbers.stages) == pytest.approx(1)


@pytest.mark.parametrize(("variant", "gpu"), [(None, "rtx4090"), ("half", "a100-40")])
def test_a_larger_cluster_is_found_where_one_is_too_small(
    unprepared: Unprepared, variant: str | None, gpu: str
) -> None:
    def sized(recipe: Recipe, nodes: int) -> Estimate:
        return size(read_inputs(recipe, nodes, 4, variant=variant, size=Size(128, 128)), ACCELERATORS[gpu])

    finetune = LARGE["distill"] | {"steps": 1, "activation_checkpointing": True}
    recipe = load_recipe(unprepared("qwen", **LARGE | {"topology": {"stages": 4, "replicas": 1}}, finetune=finetune))
    numbers = sized(recipe, 1)
    assert not numbers.fits
    assert numbers.smallest is not None
    assert numbers.smallest.nodes > 1
    assert numbers.smallest.stages * numbers.smallest.replicas == numbers.smallest.nodes * 4
    topology = Topology(stages=numbers.smallest.stages, replicas=numbers.smallest.replicas)
    found = recipe.model_copy(update={"topology": topology})
    assert sized(found, numbers.smallest.nodes).fits
    assert not sized(recipe, numbers.smallest.nodes // 2).fits


@pytest.mark.parametrize("family", TEACHERS)
def test_every_family_can_be_sized(unprepared: Unprepared, family: str) -> None:
    numbers = size(read_inputs(load_recipe(unprepared(family)), 1, 2), ACCELERATORS["h100"])
    assert numbers.fits
    assert numbers.sample == Size(8, 8)
    assert numbers.tokens == {"image": 16, "text": {"qwen": CAPTION, "flux": 4, "sd3": 8 + 4}[family]}
    assert numbers.plan.startswith("assumed")
    assert numbers.smallest is not None
    assert (numbers.smallest.world, numbers.smallest.stages) == (1, 1)


def test_the_runs_own_plan_is_used_where_there_is_one(unprepared: Unprepared) -> None:
    path = unprepared("qwen")
    write_plan(path, (0, 1), (2, 4))
    numbers = size(read_inputs(load_recipe(path), 1, 2), ACCELERATORS["h100"])
    assert numbers.plan.endswith("plan.yaml")
    assert [stage.layers for stage in numbers.stages] == [("0-1",), ("2-4",)]


def test_a_plan_that_is_given_is_sized_before_anything_is_planned(unprepared: Unprepared, tmp_path: Path) -> None:
    units = (
        UnitPlan(name="deep", span=(0, 1), streams=("image", "text")),
        UnitPlan(name="line", kind="ffn", span=(3, 3), streams=("image",)),
    )
    Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=units, variants={"v": ("deep", "line")}).save(
        tmp_path / "given.yaml"
    )
    path = unprepared("qwen", plan={"rule": "given", "given": str(tmp_path / "given.yaml"), "variants": {}})
    numbers = size(read_inputs(load_recipe(path), 1, 2), ACCELERATORS["h100"])
    assert numbers.plan == str(tmp_path / "given.yaml")
    block = 6 * 32 * 32 * 2 + 8 * 32 * 32 + 16 * 32 * 32  # weights; biases and norms aside
    assert numbers.parameters == pytest.approx(block + 32 * 32, rel=0.05)


def test_options_of_the_recipe_that_save_memory_do(unprepared: Unprepared) -> None:
    distill = {"micro_batches_per_step": 1}
    options = {"topology": {"stages": 1, "replicas": 1}, "plan": {"variants": {"half": 0.5}}}

    def sized(**more: Any) -> Estimate:
        path = unprepared("qwen", **options, distill=distill | more)
        return size(read_inputs(load_recipe(path), 1, 1, size=Size(64, 64)), ACCELERATORS["h100"])

    plain, checkpointed, offloaded = sized(), sized(activation_checkpointing=True), sized(optimizer={"offload": True})
    [before], [after] = plain.stages, checkpointed.stages
    key = "unit training"
    assert after.memory.phases[key]["activations"] < before.memory.phases[key]["activations"] / 1.5
    flops = [next(phase.flops for phase in found.step if phase.name == key) for found in (plain, checkpointed)]
    assert flops[1] == pytest.approx(flops[0] * 4 / 3)
    assert offloaded.stages[0].memory.resident["optimizer"] == 0


def test_whole_runs_are_counted_in_teacher_forwards(unprepared: Unprepared) -> None:
    """1,000 steps of 16 samples; images drawn first cost evaluate.steps forwards each, twice with guidance."""
    own = {"steps": 1000, "micro_batch": 4, "micro_batches_per_step": 4}
    draw = {"evaluate": {"steps": 20, "guidance": 4.0}}
    path = unprepared("qwen", distill=own | {"replay": {"uses": 4}, "trajectories": {"guidance": [4, 4]}}, **draw)
    found = size(read_inputs(load_recipe(path), 1, 2), ACCELERATORS["h100"]).runs
    assert [run.forwards for run in found] == [8000, 32000, 4000, 16000 + 16000 * 20 * 2]
    plain = size(read_inputs(load_recipe(unprepared("qwen", distill=own, **draw)), 1, 2), ACCELERATORS["h100"]).runs
    assert [run.forwards for run in plain] == [16000, 4000, 32000, 16000 + 16000 * 20 * 2]
    assert plain[-1].flops == found[-1].flops
    assert found[0].hours == pytest.approx(found[0].flops / (ACCELERATORS["h100"].tflops * 1e12 * 0.4) / 3600)


def test_it_says_where_replayed_readings_should_lie(unprepared: Unprepared) -> None:
    def notes(ring: int, offload: bool) -> str:
        replay = {"uses": 4, "ring": ring, "offload": offload}
        more = {"distill": LARGE["distill"] | {"replay": replay}, "topology": {"stages": 4, "replicas": 8}}
        recipe = load_recipe(unprepared("qwen", **LARGE | more))
        numbers = size(read_inputs(recipe, 4, 8, size=Size(128, 128)), ACCELERATORS["h100"])
        assert ("replay" in numbers.memory.host) == offload
        return " ".join(numbers.notes)

    assert "set distill.replay.offload: true; the accelerator is too small" in notes(200, False)
    assert "set distill.replay.offload: false; the accelerator has room" in notes(2, True)
    assert "replay" not in notes(2, False) + notes(200, True)


def test_it_says_where_every_process_should_have_the_whole_teacher(unprepared: Unprepared, tmp_path: Path) -> None:
    file = tmp_path / "teacher.json"  # which divides the smallest parameters, too: there are none but small ones here
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')

    def sized(whole: bool, gib: float = 80.0) -> Estimate:
        teacher: dict[str, Any] = {"ranks_per_copy": 1} if whole else {}
        recipe = load_recipe(unprepared("qwen", config={"num_layers": 12}, teacher=teacher))
        recipe = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"teacher": file})})
        card = ACCELERATORS["h100"].model_copy(update={"memory_gib": gib})
        return size(read_inputs(recipe, 1, 2), card)

    def notes(whole: bool, usable: float) -> str:
        return " ".join(sized(whole, usable / 0.9 / 2**30).notes)

    divided, whole = (sized(each).memory.peak for each in (False, True))
    assert divided < whole
    assert "set teacher.ranks_per_copy: 1" in notes(False, whole + 1)
    assert "ranks_per_copy" not in notes(False, (divided + whole) / 2) + notes(True, whole + 1)
    assert "leave teacher.ranks_per_copy out" in notes(True, (divided + whole) / 2)
    recipe = load_recipe(unprepared("qwen", teacher={"offload": "cpu"}))
    said = " ".join(size(read_inputs(recipe, 1, 2), ACCELERATORS["h100"]).notes)
    assert "set teacher.ranks_per_copy: 1 and leave teacher.offload out" in said


def test_probing_counts_where_it_takes_more_than_training(
    unprepared: Unprepared, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes what there is, unless the recipe says how many blocks at once."""
    for own, fits in (({}, True), ({"blocks_at_once": 6}, False)):
        probe = {"batch_size": 1, "batches": 4, "max_span": 6} | own
        recipe = load_recipe(unprepared("qwen", probe=probe))
        least = size(read_inputs(recipe, 1, 2), ACCELERATORS["h100"])
        card = ACCELERATORS["h100"].model_copy(update={"memory_gib": least.memory.peak / 0.9 / 2**30 + 1e-6})
        numbers = size(read_inputs(recipe, 1, 2), card)
        assert (numbers.trains, numbers.fits) == (True, fits)
        show(numbers)
        assert ("probing does not fit" in capsys.readouterr().out) == (not fits)


def test_micro_batches_that_do_not_fill_the_cluster_are_rounded_up_and_said(unprepared: Unprepared) -> None:
    numbers = size(read_inputs(load_recipe(unprepared("qwen")), 3, 2), ACCELERATORS["h100"])
    assert numbers.micro_batches == 6
    assert numbers.samples == 24
    assert any("micro_batches_per_step is 4" in note for note in numbers.notes)


def test_the_command_prints_tables_and_writes_all_numbers(unprepared: Unprepared, tmp_path: Path) -> None:
    path = unprepared("qwen", config={"num_layers": 12}, plan={"variants": {"half": 0.5}})
    file = tmp_path / "made" / "numbers.json"
    printed = command("estimate", path, "--nodes", "2", "--gpus-per-node", "2", "--size", "4x8", "--json", file)
    for words in ("assumed", "fits: ", "stage", "at least", "smallest cluster", "to paste", "disk: ", "this machine's"):
        assert words in printed
    assert "teacher partition" not in printed
    assert "e-0" not in printed
    longer = command("estimate", path, "--nodes", "2", "--gpus-per-node", "2", "--size", "4x8", "--details")
    for words in ("teacher partition", "teacher copy in the node", "moments, float64"):
        assert words in longer
    assert all(len(line) <= 80 for line in printed.splitlines() if line[:1] in "┃│├┡")
    numbers = Estimate.model_validate_json(file.read_text())
    assert (numbers.cluster.nodes, numbers.cluster.stages, numbers.cluster.replicas) == (2, 2, 2)
    assert numbers.sample == Size(4, 8)
    assert printed.index("fits: ") < printed.index("evaluate") < printed.index("lower bounds")
    assert json.loads(file.read_text())["stages"][0]["memory"]["peak"] == numbers.stages[0].memory.peak


def test_the_exit_code_says_when_a_run_does_not_fit(unprepared: Unprepared) -> None:
    path = unprepared("qwen", **LARGE | {"topology": {"stages": 1, "replicas": 1}})
    printed = command("estimate", path, "--accelerator", "rtx4090", "--size", "1024", code=1)
    assert "does not fit: " in printed
    assert "no cluster of up to 128 such nodes fits" in printed


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"nodes": 0}, "at least 1"),
    ({"gpus_per_node": 3}, r"topology.stages \(2\) does not divide; set it to 1 or 3"),
    ({"gpus_per_node": 1}, r"topology.stages \(2\) does not divide; set it to 1, or"),
    ({"accelerator": "h10"}, "did you mean 'h100'"),
    ({"utilisation": 40}, "--utilisation 40"),
    ({"pixels": "big"}, "--size: big is no size"),
    ({"pixels": "7"}, "have to be multiples of 2"),
    ({"json": Path("/proc/numbers.json")}, "--json /proc/numbers.json"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS, ids=[words for _, words in BAD_ARGUMENTS])
def test_a_wrong_argument_is_one_line(unprepared: Unprepared, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        estimate(load_recipe(unprepared("qwen")), **{"nodes": 1} | arguments)
    assert "\n" not in str(refused.value)


def test_a_fault_of_the_recipe_is_one_line_and_exit_code_2(unprepared: Unprepared) -> None:
    path = unprepared("qwen")
    write_plan(path, (0, 1))
    printed = command("estimate", path, code=2).strip()
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    assert "topology.stages is 2" in printed


def test_a_copy_of_the_teacher_on_a_number_of_ranks_that_does_not_divide_them_is_refused(
    unprepared: Unprepared,
) -> None:
    recipe = load_recipe(unprepared("qwen"))
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"ranks_per_copy": 3})})
    with pytest.raises(UserError, match="ranks_per_copy is 3"):
        size(read_inputs(recipe, 1, 4), ACCELERATORS["h100"])


@pytest.mark.parametrize(
    ("text", "sides"), [("128", Size(128, 128)), ("96x160", Size(96, 160)), ("96x160x9", Size(96, 160, 9))]
)
def test_sizes_are_one_to_three_numbers(text: str, sides: Size) -> None:
    assert read_size(text) == sides


@pytest.mark.parametrize("text", ["", "0", "x", "12x", "x12", "1x2x3x4", "1x0x3", "-4", "1.5"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--size"):
        read_size(text)


def test_another_number_of_processes_changes_the_replicas() -> None:
    recipe = Topology(stages=4, replicas=2)
    assert cluster_for(recipe, 1, 8) == Cluster(1, 8, 4, 2)
    assert cluster_for(recipe, 4, 8) == Cluster(4, 8, 4, 8)


def test_growing_clusters_try_the_recipes_own_stages_first() -> None:
    clusters = list(growing_clusters(Topology(stages=4, replicas=2), gpus_per_node=8, layers=10, most=4))
    worlds = [cluster.world for cluster in clusters]
    assert worlds == sorted(worlds)
    assert list(dict.fromkeys(worlds)) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    first = [next(cluster for cluster in clusters if cluster.world == world) for world in (2, 3, 4, 8, 16, 32)]
    assert [(cluster.stages, cluster.replicas) for cluster in first] == [(2, 1), (3, 1), (4, 1), (4, 2), (4, 4), (4, 8)]
    assert all(each.stages * each.replicas == each.world and each.stages <= 10 for each in clusters)


def test_a_copy_of_the_teacher_lies_in_a_node_unless_the_users_own_files_say_otherwise(
    unprepared: Unprepared, tmp_path: Path
) -> None:
    recipe = load_recipe(unprepared("qwen"))
    teacher = Teacher(recipe.teacher.path, weights=False)
    sharding = sharding_of(recipe, teacher, gpus_per_node=8)
    assert (sharding.ranks_per_copy, sharding.persistent) == (8, 10_000)
    keys = {"max_live_parameters": 3e8, "prefetch_bucket_size": 0, "param_persistence_threshold": 7}
    zero = {"zero_optimization": {f"stage3_{key}": value for key, value in keys.items()}}
    (tmp_path / "teacher.json").write_text(json.dumps(zero))
    path = unprepared("qwen", teacher={"ranks_per_copy": 2}, deepspeed={"teacher": str(tmp_path / "teacher.json")})
    expected = Sharding(ranks_per_copy=2, max_live=300_000_000, prefetch=0, persistent=7)
    assert sharding_of(load_recipe(path), teacher, gpus_per_node=8) == expected


MACHINE = Accelerator(name="it", memory_gib=1, tflops=2e-12, tflops64=1, intra_gb=10e-9, inter_gb=1e-9)
"""At half its peak one FLOP a second, and 10 and 1 bytes."""


def test_both_kinds_of_link_work_at_once() -> None:
    assert seconds_of(Traffic(intra=20, inter=1), MACHINE) == pytest.approx(2)
    assert seconds_of(Traffic(intra=20, inter=3), MACHINE) == pytest.approx(3)


def test_a_step_takes_at_least_the_slower_of_arithmetic_and_traffic_of_the_fullest_stage_in_each_phase() -> None:
    busy = [
        Phase("teacher forward", flops=4, moved=Traffic(intra=20)),
        Phase("exchange", moved=Traffic(inter=3), beside_next=True),
        Phase("unit training", flops=5),
        Phase("gradient reduction", moved=Traffic(intra=10)),
    ]
    idle = [Phase(phase.name, beside_next=phase.beside_next) for phase in busy]
    step, seconds = least_time([idle, busy], MACHINE, utilisation=0.5)
    assert [phase.seconds for phase in step] == pytest.approx([4, 3, 5, 1])
    assert seconds == pytest.approx(4 + 5 + 1)
    waiting = Phase("pipeline", flops=6, moved=Traffic(inter=7), waits=0.25)
    assert least_time([[waiting]], MACHINE, utilisation=0.5)[1] == pytest.approx(8)


def test_more_accelerators_probe_faster_and_weak_float64_is_slow(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen"))
    two, four, weak = (
        size(read_inputs(recipe, 1, world), ACCELERATORS[name]).probing_seconds
        for world, name in ((2, "h100"), (4, "h100"), (2, "l40s"))
    )
    assert four == pytest.approx(two / 2)
    assert weak > 2 * two


def test_every_accelerator_is_faster_inside_the_node_than_between_nodes() -> None:
    for name, accelerator in ACCELERATORS.items():
        assert accelerator.name == name
        assert accelerator.intra_gb > accelerator.inter_gb
        assert 0 < accelerator.usable_bytes < accelerator.memory_gib * 2**30
