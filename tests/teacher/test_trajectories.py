"""Trajectories: step by step they are what the stock pipeline draws, and a pool is what its numbers say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.data.batch import Prompt
from ppcl_ds.data.stream import MicroBatchStream
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import checkpoint_tag, load_recipe
from ppcl_ds.sampling import Trajectories
from ppcl_ds.teacher.guidance import Guide
from ppcl_ds.teacher.noising import Noiser, NoisyStream
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.teacher import forward, open_teacher
from ppcl_ds.teacher.trajectories import Trajectory, TrajectoryStream
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.watch.tensorboard import read_scalars
from tests.calls import answer
from tests.conftest import command
from tests.data.test_encoding import SIZE, options
from tests.data.test_noising import Family
from tests.plans import ten_spans

STEPS = 40


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["without guidance", "with guidance"])
@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_steps_by_hand_end_where_the_pipeline_does(name: str, scale: float, tmp_path: Path) -> None:
    """Qwen-Image guides in two forwards and keeps norms; SD3 in one of twice the samples."""
    family = Family(name, tmp_path / "teacher")
    call = PipelineCall(tmp_path / "teacher", options=options(name))
    model, noiser = family.stock.transformer.eval(), Noiser(call, family.noiser.texts, torch.float32)
    sample = family.batch(["a tiny red cat"]).samples[0]
    prompt, empty, guiding = sample.prompt, noiser.texts.empty, noiser.texts.guiding
    assert guiding is not None
    both = replace(prompt, text=guiding(tuple(prompt.text), tuple(empty.text))) if scale > 1 else prompt
    latents = noise = torch.randn(call.latents_shape(SIZE), generator=torch.Generator().manual_seed(0))
    answers = {part: partial(answer, getattr(family.stock, part)) for part in call.transformers()}
    expected, _ = call.draw(answers, noise, both, SIZE, STEPS, scale)
    guide, to_step = Guide(call), call.to_step(SIZE)

    def says(asked: Prompt) -> Tensor:
        return forward(model, call.arguments(latents, rung, asked, SIZE))

    with torch.no_grad(), call.stepping(STEPS):
        call._ladders.clear()
        ladder = call.ladder(SIZE)
        for rung in range(len(ladder)):
            output = to_step(says(prompt))
            if scale > 1:
                output = guide(says(prompt), says(empty), latents, rung, both, SIZE, scale)
            latents = ladder.step(latents, output, rung, rung + 1)
    torch.testing.assert_close(latents, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.fixture
def stream(new_run: Callable[..., Path]) -> Callable[..., TrajectoryStream]:
    def make(**trajectories: Any) -> TrajectoryStream:
        path = new_run("qwen", distill={"trajectories": {"steps": [3, 6], **trajectories}})
        recipe = load_recipe(path)
        settings = recipe.distill.trajectories
        assert settings is not None
        return TrajectoryStream(recipe, open_teacher(recipe).call, "train", 4, lanes=2, settings=settings)

    return make


def go_on(stream: TrajectoryStream, readings: int) -> list[tuple[Trajectory, ...]]:
    """Pools of lane 0 before each reading; the teacher always says zero."""
    seen = []
    batches = stream.take(0, 2)
    for _ in range(readings):
        number, batch = next(batches)
        seen.append(stream.pools[0, 0])
        said = torch.zeros(4, *stream.call.output_shape(batch.size)[1:])
        stream.advance(number, said, None if batch.other is None else said)
    return seen


def test_every_picture_has_a_schedule_of_its_own(stream: Callable[..., TrajectoryStream]) -> None:
    """From the noisiest rung on, each rung once, in 3 to 6 steps but for those that the pool begins with."""
    seen = go_on(stream(), 30)
    whole = [picture for picture in {p.number: p for pool in seen for p in pool}.values() if picture.number >= 4]
    assert len(whole) > 10
    assert {len(picture.rungs) for picture in whole} == {3, 4, 5, 6}
    for picture in whole:
        assert picture.rungs[0] == 0
        assert list(picture.rungs) == sorted(set(picture.rungs))
    assert len({picture.rungs for picture in whole}) == len(whole)
    assert len({pool[0].place for pool in seen}) > 2
    assert any(len({picture.place for picture in pool}) > 1 for pool in seen[2:]), "places are staggered"


def test_places_are_those_of_the_times_that_the_transformer_reads(stream: Callable[..., TrajectoryStream]) -> None:
    own = stream()
    for _ in range(3):
        [(number, batch)] = islice(own.take(0, 2), 1)
        times = own.call.ladder(batch.size).times
        read = [float(times[round(place * len(times))]) / 1000 for place in batch.places.tolist()]
        assert batch.arguments["timestep"].tolist() == pytest.approx(read, abs=1e-6)
        own.advance(number, torch.zeros(4, *own.call.output_shape(batch.size)[1:]), None)
    assert len(set(batch.places.tolist())) > 1


def test_guidance_is_drawn_from_its_range(stream: Callable[..., TrajectoryStream]) -> None:
    scales = {picture.scale for pool in go_on(stream(guidance=[2.0, 5.0]), 20) for picture in pool}
    assert 2 <= min(scales) < 3 < max(scales) <= 5
    assert {picture.scale for pool in go_on(stream(), 5) for picture in pool} == {1.0}


def test_a_share_of_the_micro_batches_is_of_images(new_run: Callable[..., Path]) -> None:
    """Whoever reads them; they are what a run on images alone reads under the same numbers."""
    path = new_run("qwen", distill={"trajectories": {"steps": [3, 6]}}, data={"real_share": 0.3})
    recipe = load_recipe(path)
    call, settings = open_teacher(recipe).call, recipe.distill.trajectories
    assert settings is not None
    images = dict(islice(NoisyStream(recipe, call, "train", 4, 2).take(0, 1), 60))
    every = dict(islice(TrajectoryStream(recipe, call, "train", 4, 2, settings).take(0, 1), 60))
    real = [number for number, batch in every.items() if batch.number is None]
    assert 8 <= len(real) <= 28
    for number in real:
        torch.testing.assert_close(every[number].arguments, images[number].arguments, rtol=0, atol=0)
        assert torch.equal(every[number].target, images[number].target)
    one = TrajectoryStream(recipe, call, "train", 4, 2, settings).take(1, 2)
    assert [number for number, batch in islice(one, 30) if batch.number is None] == [n for n in real if n % 2]


def test_a_picture_that_is_not_finite_is_replaced(stream: Callable[..., TrajectoryStream]) -> None:
    own = stream()
    number, batch = next(own.take(0, 2))
    before = own.pools[0, 0]
    said = torch.zeros(4, *own.call.output_shape(batch.size)[1:])
    said[3] = torch.nan
    own.advance(number, said, None)
    assert own.dropped == 1
    after = own.pools[0, 0][3]
    assert (after.place, after.number) == (0, max(picture.number for picture in own.pools[0, 0]))
    assert after.number > before[3].number
    assert all(picture.latents.isfinite().all() for picture in own.pools[0, 0])


def test_a_scale_that_is_a_number_to_the_transformer_is_not_drawn(new_run: Callable[..., Path]) -> None:
    recipe = load_recipe(new_run("qwen"))
    call = open_teacher(recipe).call
    call.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UserError, match="takes the scale as a number"):
        TrajectoryStream(recipe, call, "train", 2, 1, Trajectories(guidance=(2.0, 2.0)))


def test_a_text_file_is_enough(new_run: Callable[..., Path]) -> None:
    """The road from captions to a pruned pipeline, with no image, and no weights of the VAE until it draws."""
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    captions, vae = path.parent / "captions.txt", path.parent / "teacher" / "vae"
    captions.write_text("".join(f"a tiny {word}\n" for word in ("zero", "one", "two", "three")) * 16)
    raw["data"] |= {"source": str(captions), "shards": "{run}/words", "sizes": {"8x8": 2, "6x10": 1}}
    raw["topology"] = {"stages": 1, "replicas": 1}
    raw["finetune"] = {"steps": 2, "micro_batch": 4, "micro_batches_per_step": 1, "variants": ["small"]}
    path.write_text(yaml.safe_dump(raw))
    hidden = [weights.rename(weights.with_suffix(".hidden")) for weights in vae.glob("*.safetensors")]
    for step in ("shard", "encode"):
        command(step, path, program="data_tools.cli")
    command("probe", path)
    command("plan", path)
    assert "holds captions alone; set distill.trajectories: {}, or give images" in command("distill", path, code=2)
    for section in ("distill", "finetune"):
        raw[section]["trajectories"] = {"steps": [2, 4], "guidance": [1, 2]}
    path.write_text(yaml.safe_dump(raw))
    command("distill", path)
    command("plan", path, "--from-run", path.parent)
    for weights in hidden:
        weights.rename(weights.with_suffix(".safetensors"))
    raw["finetune"]["sample_every"] = 2
    path.write_text(yaml.safe_dump(raw))
    command("finetune", path, "--variant", "small")
    command("consolidate", path)
    command("evaluate", path)
    recipe = load_recipe(path)
    models = json.loads((recipe.run / "report.json").read_text())["models"]
    assert {model["name"] for model in models} >= {"teacher", "small", "small-finetuned", "small-undistilled"}
    assert all(0 < model["velocity_mse"] < 1e3 for model in models if model["name"] != "teacher")
    scalars = read_scalars(recipe.finetuning("small").board)
    assert "heldout/velocity/trajectories" in scalars


def test_finished_pictures_are_a_data_set(new_run: Callable[..., Path]) -> None:
    """Written once each, though the run goes back and the ring is filled again; every one with its caption."""
    own = {"trajectories": {"steps": [2, 3]}, "replay": {"uses": 2, "ring": 3}, "steps": 12, "checkpoint_every": 6}
    path = new_run("qwen", distill=own | {"keep_pictures": 12}, noise={"caption_dropout": 0.0})
    ten_spans().save(load_recipe(path).plan_file)
    command("distill", path)
    recipe = load_recipe(path)
    folder, found = recipe.run / "pictures", []
    for _ in range(2):
        pictures = recipe.data.model_copy(update={"shards": folder})
        stream = MicroBatchStream(pictures, "train", 1, 0, recipe.bad_samples)
        samples = [stream.sample(0, number) for number in range(len(stream))]
        found.append({sample.key: sample.latents for sample in samples})
        assert len(found[-1]) == len(samples) == 12
        assert all(sample.caption and sample.latents.shape == (1, 1, 8, 8) for sample in samples)
        command("verify", folder / "encoded", program="data_tools.cli")
        (recipe.distillation.checkpoints / "latest").write_text(checkpoint_tag(6))
        command("distill", path)
    torch.testing.assert_close(found[0], found[1])


def test_a_run_on_trajectories_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    new_run: Callable[..., Path],
) -> None:
    more = {"trajectories": {"steps": [2, 4]}, "replay": {"uses": 2, "ring": 2}, "steps": 6, "checkpoint_every": 3}
    path = new_run("qwen", distill=more)
    ten_spans().save(load_recipe(path).plan_file)
    checkpoints = load_recipe(path).distillation.checkpoints
    found = []
    for _ in range(2):
        command("distill", path)
        last = newest_checkpoint(checkpoints)
        assert last.contents.step == 6
        found.append({unit: last.unit(unit) for unit in last.contents.units})
        (checkpoints / "latest").write_text(checkpoint_tag(3))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
