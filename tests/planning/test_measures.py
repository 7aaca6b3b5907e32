"""What units cost by every measure: held against stock pipelines and models, in one process."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.planning.swaps import Swaps, load_swaps
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.branches import LEVELS, Branches
from ppcl_ds.teacher.noising import NoisyStream
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.units.variant import assembled
from tests.calls import packed
from tests.conftest import TEACHERS, command, make_recipe

SPANS = [(0, 1), (2, 3), (2, 4)]
UNITS = tuple(UnitPlan(name=f"unit_{u}_{v}", span=(u, v), streams=("image", "text")) for u, v in SPANS)
LIBRARIES = {
    "qwen": Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=UNITS, variants={}),
    "flux": Plan(teacher="FluxTransformer2DModel", blocks=9, units=(*UNITS[:2],), variants={}),
}
SCALES = {"qwen": 3.0, "flux": 2.5}
BATCH, BATCHES, SAMPLES, PROMPTS, STEPS = 4, 2, 3, 5, 2
"""Of the recipe's evaluation; the planner reads what lies behind."""


def evaluate(family: str) -> dict[str, Any]:
    return {
        "guidance": SCALES[family],
        "samples": SAMPLES,
        "few_steps": STEPS,
        "batch_size": BATCH,
        "velocity_batches": BATCHES,
    }


class Stock:
    """The family's pipeline as it is loaded from disk, with another transformer in it.

    It knows nothing of how the planner measures but which samples it reads, and their noise.
    """

    def __init__(self, recipe: Recipe, family: str) -> None:
        self.recipe, self.family = recipe, family
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(recipe.teacher.path, trust_remote_code=True)
        encode = self.pipe.encode_prompt
        self.pipe.encode_prompt = lambda *args, **kwargs: rounded(encode(*args, **kwargs))
        self.pipe.set_progress_bar_config(disable=True)
        self.teacher: Teacher = open_teacher(recipe)
        self.scale = {"true_cfg_scale" if family == "qwen" else "guidance_scale": SCALES[family]}
        self.heldout = NoisyStream(recipe, self.teacher.call, "heldout", 1, captions=True).clean

    def sample(self, number: int) -> Any:
        return self.heldout.batch(number).samples[0]

    def run(self, number: int, latents: Tensor, steps: int, **how: Any) -> Tensor:
        with torch.no_grad():
            return self.pipe(
                self.sample(number).caption,
                height=8,
                width=8,
                num_inference_steps=steps,
                latents=latents,
                output_type="latent",
                **self.recipe.teacher.options | self.scale | how,
            ).images

    def draws(self) -> Tensor:
        """(PROMPTS, ...) latents after a few steps of the stock pipeline, from the noise of the samples' numbers."""
        drawn = []
        for number in range(SAMPLES, SAMPLES + PROMPTS):
            noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(self.recipe.seed + number))
            drawn.append(self.run(number, packed(noise), STEPS))
        return torch.cat(drawn)

    def velocities(self, latents: Tensor, rungs: list[int]) -> tuple[Tensor, Tensor]:
        """Of noisy latents (N, ...), what the stock pipeline's scheduler is given, and its transformer's two answers.

        The pipeline draws in 1000 steps, of which the scheduler keeps one.
        """
        given, answers = [], []
        for number, (own, rung) in enumerate(zip(latents, rungs, strict=True), BATCH * BATCHES):
            said: list[Tensor] = []
            with self._at(rung, said), stopped_by_its_step(self.pipe.scheduler) as stepped:
                self.run(number, own[None], 1000)
            given.append(stepped[0])
            answers.append(said[0] - said[1] if len(said) > 1 else said[0])
        return torch.cat(given), torch.cat(answers)

    @contextmanager
    def _at(self, rung: int, said: list[Tensor]) -> Iterator[None]:
        scheduler, set_timesteps = self.pipe.scheduler, self.pipe.scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def keep_one(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps[rung : rung + 1]
            scheduler.sigmas = scheduler.sigmas[rung : rung + 2]

        hook = self.pipe.transformer.register_forward_hook(lambda module, args, output: said.append(output[0]))
        scheduler.set_timesteps = keep_one
        try:
            yield
        finally:
            del scheduler.set_timesteps
            hook.remove()


def rounded(texts: Any) -> Any:
    """Floats as they are stored on disk."""
    return pytree.tree_map_only(Tensor, lambda t: t.bfloat16().float() if t.is_floating_point() else t, texts)


@contextmanager
def stopped_by_its_step(scheduler: Any) -> Iterator[list[Tensor]]:
    step, seen = scheduler.step, []

    def noted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    scheduler.step = noted
    yield seen
    del scheduler.step


def noisy(stock: Stock) -> tuple[Tensor, list[int], Tensor]:
    """Latents that the planner's samples are noised to, their rungs, and levels; by the product's own noise."""
    branches = Branches(stock.recipe, stock.teacher.call, BATCH)
    latents, rungs, levels = [], [], []
    for number in range(BATCHES, 2 * BATCHES):
        sampled = branches.noisy(number, branches.stream.clean.batch(number))
        latents.append(sampled.batch.arguments["hidden_states"])
        rungs += [int(place * 1000) for place in sampled.batch.places]
        levels.append(sampled.levels)
    return torch.cat(latents), rungs, torch.cat(levels)


@pytest.fixture(scope="module")
def measured(
    prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[Recipe, Swaps, Checkpoint]]:
    """`measured(family, ranks)`: a library that was trained for a step, measured on so many ranks."""
    made: dict[tuple[str, int], tuple[Recipe, Swaps, Checkpoint]] = {}

    def make(family: str, ranks: int) -> tuple[Recipe, Swaps, Checkpoint]:
        if (family, ranks) not in made:
            run = tmp_path_factory.mktemp("measured") / "run"
            shutil.copytree(prepared(family), run)
            raw = make_recipe(family, run)
            raw["evaluate"] = evaluate(family)
            raw["plan"] |= {"variants": {"v": 0.3}, "prompts": PROMPTS}
            raw["topology"] = {"stages": ranks, "replicas": 1}
            raw["distill"] |= {"steps": 1, "optimizer": {"lr": 1e-2}}
            path = run / "recipe.yaml"
            path.write_text(yaml.safe_dump(raw))
            recipe = load_recipe(path)
            if family == "flux":
                torch.manual_seed(0)
                embedding = diffusers.FluxTransformer2DModel(**TEACHERS["flux"][1], guidance_embeds=True)
                embedding.save_pretrained(run / "teacher" / "transformer")
            LIBRARIES[family].model_copy(update={"variants": {"v": ("unit_0_1",)}}).save(recipe.plan_file)
            command("distill", path)
            command("plan", path, "--from-run", recipe.run)
            swaps = load_swaps(recipe.swaps_file)
            assert swaps is not None
            made[family, ranks] = recipe, swaps, newest_checkpoint(recipe.distillation.checkpoints)
        return made[family, ranks]

    return make


def recipe_choice(recipe: Recipe) -> list[tuple[str, ...]]:
    """The sets of the plan that was chosen."""
    return list(load_plan(recipe.plan_file, open_teacher(recipe)).variants.values())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", SCALES)
def test_every_measure_is_what_the_stock_pipeline_does(
    measured: Callable[[str, int], tuple[Recipe, Swaps, Checkpoint]], family: str, ranks: int
) -> None:
    """Qwen-Image guides in two forwards and keeps norms; FLUX.1-dev reads the scale as a number, so has no branches."""
    recipe, swaps, checkpoint = measured(family, ranks)
    assert set(swaps.products) == ({"velocity", "branches", "draw"} if family == "qwen" else {"velocity", "draw"})
    stock, library = Stock(recipe, family), LIBRARIES[family]
    latents, rungs, levels = noisy(stock)

    def said(names: tuple[str, ...], trained: bool = True) -> dict[str, Tensor]:
        plan = library.model_copy(update={"variants": {"set": names}})
        model = assembled(stock.teacher, plan, "set", (lambda unit: checkpoint.unit(unit.name)) if trained else None)
        stock.pipe.transformer = model.eval()
        guided, branches = stock.velocities(latents, rungs)
        found = {"velocity": guided, "draw": stock.draws()} | ({"branches": branches} if family == "qwen" else {})
        return {measure: tensor.double() for measure, tensor in found.items()}

    teacher = said(())
    added = [{measure: own - teacher[measure] for measure, own in said((unit.name,)).items()} for unit in library.units]
    for measure, products in swaps.products.items():
        flat = torch.stack([each[measure].flatten() for each in added])
        expected = flat @ flat.T / flat.shape[1]
        torch.testing.assert_close(torch.tensor(products, dtype=torch.float64), expected, rtol=1e-3, atol=1e-9)
        assert expected.diagonal().min() > 0
    for each in swaps.sets:
        own, removed = said(each.units), said(each.units, trained=False)
        assert bool(each.removed) == (each.units in recipe_choice(recipe))
        for measure, error in each.errors.items():
            difference = (own[measure] - teacher[measure]).square()
            assert error == pytest.approx(float(difference.mean()), rel=1e-3)
            if each.removed:
                gone = (removed[measure] - teacher[measure]).square().mean()
                assert each.removed[measure] == pytest.approx(float(gone), rel=1e-3)
            if measure != "draw":
                by_sample = difference.flatten(1).mean(1)
                curve = [float(by_sample[levels == level].mean()) for level in range(LEVELS)]
                assert each.by_noise[measure] == pytest.approx(curve, rel=1e-3)


@pytest.mark.parametrize("family", SCALES)
def test_two_ranks_measure_what_one_does(
    measured: Callable[[str, int], tuple[Recipe, Swaps, Checkpoint]], family: str
) -> None:
    one, two = (measured(family, ranks)[1] for ranks in (1, 2))
    for measure, products in one.products.items():
        torch.testing.assert_close(torch.tensor(products), torch.tensor(two.products[measure]), rtol=1e-3, atol=1e-9)


def test_what_an_earlier_version_has_measured_is_measured_anew(
    measured: Callable[[str, int], tuple[Recipe, Swaps, Checkpoint]],
) -> None:
    recipe, swaps, _ = measured("flux", 1)
    content = json.loads(recipe.swaps_file.read_text())
    older = content | {"products": content["products"]["velocity"], "sets": []}
    recipe.swaps_file.write_text(json.dumps(older))
    printed = command("plan", recipe.run / "recipe.yaml", "--from-run", recipe.run)
    assert "as earlier versions measured" in printed
    again = load_swaps(recipe.swaps_file)
    assert again is not None
    for measure, products in swaps.products.items():
        torch.testing.assert_close(torch.tensor(again.products[measure]), torch.tensor(products))


def test_a_plan_shows_every_measure(measured: Callable[[str, int], tuple[Recipe, Swaps, Checkpoint]]) -> None:
    recipe, _, _ = measured("qwen", 1)
    command("plan", recipe.run / "recipe.yaml", "--show")
    page = (recipe.run / "report.html").read_text()
    for words in ("velocity MSE", "branch MSE", "few-step MSE", "of what removal costs", "variants by noise level"):
        assert words in page


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("flux", {"objective": "branches"}, "plan.objective: branches: at this recipe's evaluate.guidance"),
        ("qwen", {"objective": "pretty"}, "plan.objective"),
        ("qwen", {"prompts": 0}, "plan.prompts"),
    ],
)
def test_an_objective_that_cannot_be_had_is_refused(
    new_run: Callable[..., Path], family: str, plan: dict[str, Any], words: str
) -> None:
    path = new_run(family, plan=plan)
    recipe = load_recipe(new_run(family))
    LIBRARIES[family].model_copy(update={"variants": {"v": ("unit_0_1",)}}).save(recipe.plan_file)
    command("distill", recipe.run / "recipe.yaml")
    printed = command("plan", path, "--from-run", recipe.run, code=2)
    assert words in printed
    assert len(printed.strip().splitlines()) == 1
