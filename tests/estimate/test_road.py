"""The road in hours and money, against sums by hand; tokens and sizes as encoded; the layout that is proposed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds import launch
from ppcl_ds.cluster.refusals import parts_of
from ppcl_ds.data.batch import Size
from ppcl_ds.data.index import split_entries
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, accelerator_for
from ppcl_ds.estimate.estimate import estimate, size
from ppcl_ds.estimate.inputs import Inputs, read_inputs
from ppcl_ds.estimate.layouts import instead
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.estimate.road import coding_of
from ppcl_ds.estimate.seen import look
from ppcl_ds.estimate.units import computed, counted, lasting, priced, sized
from ppcl_ds.probing.costs import ProbingCosts, worthwhile_parts
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import meta_forward
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import command, make_recipe

Unprepared = Callable[..., Path]


def whole(path: Path, tmp_path: Path, **options: Any) -> Estimate:
    """All numbers of the command, on one H100."""
    file = tmp_path / "numbers.json"
    estimate(load_recipe(path), 1, accelerator="h100", json=file, **options)
    return Estimate.model_validate_json(file.read_text())


def test_hours_and_cost_of_every_step_are_sums_that_one_can_do_by_hand(unprepared: Unprepared, tmp_path: Path) -> None:
    own = {"steps": 1000, "micro_batch": 4, "micro_batches_per_step": 4}
    path = unprepared(
        "qwen",
        distill=own,
        finetune=own | {"steps": 100, "variants": ["small"]},
        evaluate={"samples": 8, "batch_size": 4, "steps": 20, "guidance": 4.0, "velocity_batches": 2},
    )
    found = whole(path, tmp_path, price=3.0)
    road = {step.name: step for step in found.road}
    assert list(road) == ["encode", "probe", "plan", "distill", "finetune small", "evaluate"]
    assert road["distill"].seconds == pytest.approx(1000 * found.seconds)
    assert road["distill"].accelerator_hours == pytest.approx(1000 * found.seconds * 2 / 3600)
    assert road["probe"].seconds == pytest.approx(found.probing_seconds)
    tuned = size(read_inputs(load_recipe(path), 1, 2, "small"), ACCELERATORS["h100"])
    assert road["finetune small"].seconds == pytest.approx(100 * tuned.seconds)
    assert all(step.cost == pytest.approx(3 * step.accelerator_hours) for step in found.road)

    forward = meta_forward(Teacher(load_recipe(path).teacher.path, weights=False, size=Size(8, 8)), Size(8, 8))
    once, block = forward.flops_until[-1], forward.block_flops[0]
    # The teacher; medium, which lacks 0.34, and small, which lacks three blocks, undistilled too; small-finetuned.
    models = 1 + 2 * (1 - 0.34) + 3 * (1 - 3 * block / once)
    assert road["evaluate"].flops == pytest.approx(models * (8 * 20 * 2 + 2 * 4) * once)
    assert road["evaluate"].seconds == pytest.approx(road["evaluate"].flops / (989e12 * 0.4))
    assert road["encode"].work == "16,000 samples (assumed)"


def test_what_the_disk_will_hold(unprepared: Unprepared, tmp_path: Path) -> None:
    found = whole(unprepared("qwen", distill={"keep_checkpoints": 2}), tmp_path)
    assert found.disk["checkpoints"] == 3 * 12 * found.parameters
    assert not any(name.startswith("probe") for name in found.disk)
    call = PipelineCall(load_recipe(tmp_path / "recipe.yaml").teacher.path)
    latents, text = 8 * 8, sum(tensor.numel() for tensor in call.example(Size(8, 8)).tensors())
    assert found.disk["encoded shards"] == 3 * 4 * 4 * 2 * (latents + text)


def test_the_disk_holds_the_variants_of_a_plan_that_is_given(unprepared: Unprepared, tmp_path: Path) -> None:
    """Against the teacher's parameters less those of the blocks that the span takes, counted by their names."""
    teacher = Teacher(load_recipe(unprepared("qwen")).teacher.path, weights=False, size=Size(8, 8))
    unit = UnitPlan(name="all", span=(0, len(teacher.blocks) - 1), streams=("image",))
    plan = Plan(teacher=teacher.class_name, blocks=len(teacher.blocks), units=(unit,), variants={"tiny": ("all",)})
    plan.save(tmp_path / "given.yaml")
    given = {"rule": "given", "given": str(tmp_path / "given.yaml"), "variants": {}}
    found = whole(unprepared("qwen", plan=given, topology={"stages": 1}), tmp_path)
    gone = sum(block.parameters for block in teacher.blocks[1:])
    assert found.disk["variants"] == 4 * (found.teacher_parameters - gone)


def test_times_of_a_cpu_are_not_said_to_be_of_bf16(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen"))
    inputs = read_inputs(recipe, 1, recipe.topology.world)
    said = [" ".join(size(inputs, each).notes) for each in (accelerator_for(recipe)[0], ACCELERATORS["h100"])]
    assert ["bf16" in notes for notes in said] == [False, True]


def test_an_unknown_accelerator_of_the_recipe_is_named_by_its_key(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen", cluster={"accelerator": "h10"}))
    with pytest.raises(UserError, match=r"^cluster\.accelerator h10: .* 'h100'"):
        accelerator_for(recipe)


def test_measuring_a_library_is_counted_with_its_draws_and_both_branches(
    unprepared: Unprepared, tmp_path: Path
) -> None:
    """By the sum in `docs/planning.md`: held-out samples and draws of a few steps, twice where there is guidance."""
    drawing = {"guidance": 2.0, "velocity_batches": 2, "batch_size": 4, "few_steps": 3}
    found = whole(unprepared("qwen", plan={"candidates": ["uniform"], "prompts": 5}, evaluate=drawing), tmp_path)
    forward = meta_forward(
        Teacher(load_recipe(tmp_path / "recipe.yaml").teacher.path, weights=False, size=Size(8, 8)), Size(8, 8)
    )
    [plan] = (step for step in found.road if step.name == "plan")
    units = sum(len(stage.layers) for stage in found.stages)
    ways = units + 32 + 2  # units, random sets of them, and the teacher once for each
    assert plan.flops == pytest.approx(ways * (2 * 4 + 3 * 5) * 2 * forward.flops_until[-1])


def test_encoders_and_vae_are_counted_as_a_real_forward_counts(unprepared: Unprepared) -> None:
    """FLUX.1's: a VAE of convolutions, CLIP and T5, counted by torch while they run with weights."""
    folder = load_recipe(unprepared("flux")).teacher.path
    coding = coding_of(PipelineCall(folder, options={"max_sequence_length": 4}), Size(8, 8))
    vae = PipelineCall(folder).pipe.vae.to_empty(device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode())
    text = coding.encode + coding.decode - counter.get_total_flops()
    math = sdpa_kernel(SDPBackend.MATH)  # the CPU's own kernel is not counted
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        pipe = PipelineCall(folder).pipe
        words = torch.zeros(1, 8, dtype=torch.long)
        pipe.text_encoder.to_empty(device="cpu")(words, position_ids=torch.arange(8)[None])
        pipe.text_encoder_2.to_empty(device="cpu")(torch.zeros(1, 4, dtype=torch.long))
    assert text == counter.get_total_flops() > 0


def test_tokens_and_sizes_are_those_of_the_encoded_samples(prepared: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared("qwen"), run)
    raw = make_recipe("qwen", run)
    raw["data"]["images"]["size"] = 16  # what is encoded counts, not what the recipe says
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    seen = look(recipe.data)
    assert seen is not None
    assert seen.samples == sum(entry.samples for entry in split_entries(recipe.data, "train"))
    numbers = size(read_inputs(recipe, 1, 2), ACCELERATORS["h100"])
    assert numbers.sample == Size(8, 8)
    longest = max(tensor.shape[1] for tensor in seen.prompt.tensors())
    assert numbers.tokens["text"] == longest < 23
    assert "encoded samples" in numbers.samples_from


def test_a_micro_batch_that_nothing_holds_is_refused_at_once(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen", distill={"micro_batch": 10**6, "micro_batches_per_step": 2}))
    with pytest.raises(UserError, match=r"distill.micro_batch is 1000000: .* at most 4096 samples"):
        size(read_inputs(recipe, 1, 2), ACCELERATORS["h100"])


def test_the_smallest_cluster_is_any_number_of_gpus_and_a_tiny_teacher_needs_one(
    unprepared: Unprepared, tmp_path: Path
) -> None:
    found = whole(unprepared("qwen"), tmp_path)
    assert found.smallest is not None
    assert (found.smallest.world, found.smallest.stages) == (1, 1)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    on_one = {"topology": recipe.topology.model_copy(update={"stages": 1})}
    alone = size(read_inputs(recipe.model_copy(update=on_one), 1, 1), ACCELERATORS["h100"]).memory.peak
    two = size(read_inputs(recipe, 1, 2), ACCELERATORS["h100"]).memory.peak
    card = ACCELERATORS["h100"].model_copy(update={"memory_gib": (two + alone) / 2 / 0.9 / 2**30})
    needs = size(read_inputs(recipe, 1, 2), card).smallest
    assert needs is not None
    assert needs.world == (1 if alone < two else 2)


def test_the_layout_that_is_proposed_is_the_fastest_that_fits(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen", config={"num_layers": 12}, plan={"variants": {"half": 0.5}}))
    found = size(read_inputs(recipe, 1, 4), ACCELERATORS["h100"])
    seconds = {}
    for stages in (1, 2, 4):
        topology = recipe.topology.model_copy(update={"stages": stages})
        own = size(read_inputs(recipe.model_copy(update={"topology": topology}), 1, 4), ACCELERATORS["h100"])
        seconds[stages] = own.seconds
    assert {layout.stages: pytest.approx(layout.seconds) for layout in found.layouts} == seconds


def test_where_nothing_fits_the_least_change_that_would_is_printed(unprepared: Unprepared) -> None:
    def read(micro_batch: int) -> Inputs:
        own = {"micro_batch": micro_batch, "micro_batches_per_step": 128 // micro_batch}
        return read_inputs(load_recipe(unprepared("qwen", distill=own)), 1, 2)

    large, small = (size(read(batch), ACCELERATORS["h100"]).memory.peak for batch in (64, 1))
    card = ACCELERATORS["h100"].model_copy(update={"memory_gib": (large + small) / 2 / 0.9 / 2**30})
    inputs = read(64)
    assert not size(inputs, card).layouts
    lines = instead(inputs, card, 0.4)
    assert lines[1:] == ("micro_batch: 1  # in distill", "micro_batches_per_step: 128  # in distill")
    assert instead(inputs, card.model_copy(update={"memory_gib": 1e-5}), 0.4) == ()


def test_the_accelerator_is_the_recipes_or_this_machines(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen"))
    own, known = accelerator_for(recipe)
    assert own.name == ("CPU" if not torch.cuda.is_available() else own.name)
    assert "this machine's" in known
    assert 0 < own.tflops < 100 or torch.cuda.is_available()
    bf16 = load_recipe(unprepared("qwen", teacher={"precision": "bf16"}))
    assert torch.cuda.is_available() or accelerator_for(bf16)[1].startswith("assumed")
    named = load_recipe(unprepared("qwen", cluster={"accelerator": "l40s"}))
    assert accelerator_for(named) == (ACCELERATORS["l40s"], "cluster.accelerator")
    assert accelerator_for(named, "b200") == (ACCELERATORS["b200"], "")


@pytest.mark.parametrize(
    ("name", "tflops", "words"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, "this machine's"),
        ("NVIDIA H100 80GB HBM3", 989, "this machine's"),
        ("NVIDIA GeForce RTX 4090", 165, "this machine's"),
        ("NVIDIA RTX A1000", 989, "taken to be as fast as h100"),
    ],
)
def test_a_gpu_that_is_here_is_known_by_its_name(
    name: str, tflops: float, words: str, unprepared: Unprepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name=name, total_memory=10 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(launch, "device", lambda: torch.device("cuda"))
    found, said = accelerator_for(load_recipe(unprepared("qwen")))
    assert (found.name, found.memory_gib, found.tflops) == (name, 10, tflops)
    assert words in said


def test_probing_is_one_job_unless_it_takes_hours_or_the_recipe_says(unprepared: Unprepared) -> None:
    recipe = load_recipe(unprepared("qwen", probe={"batch_size": 1, "batches": 4}))
    costs = ProbingCosts(4, 1, 0, 0, 10**9, 0, 0, 0)
    hours = {0.01: 1, 1.0: 1, 2.6: 3, 100.0: 4}  # at most a batch a part
    assert {h: worthwhile_parts(recipe, costs, 3600 * h) for h in hours} == hours
    assert parts_of(recipe) == 1
    told = load_recipe(unprepared("qwen", cluster={"probe_parts": 2}))
    assert parts_of(told) == worthwhile_parts(told, costs, 0) == 2


def test_no_warning_stands_before_the_answer(unprepared: Unprepared) -> None:
    path = unprepared("qwen", config={"pooled_projection_dim": 768})
    assert command("estimate", path).startswith("teacher: ")


def test_units_are_those_that_people_use() -> None:
    assert [lasting(s) for s in (0, 3.7e-5, 0.0042, 12.34, 90, 13140, 1e6)] == [
        *("0 s", "37 us", "4.2 ms", "12.3 s", "1.5 min", "3.65 h", "278 h"),
    ]
    assert [sized(b) for b in (12, 3 * 2**20, 59.2 * 2**30)] == ["12 B", "3.0 MiB", "59.2 GiB"]
    assert [counted(n) for n in (30, 3000, 20.43e9)] == ["30", "3 k", "20.4 B"]
    assert computed(219e15) == "219 PFLOP"
    assert [priced(c) for c in (0.051, 57.6, 1234.5)] == ["0.05", "57.6", "1234"]
