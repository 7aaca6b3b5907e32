"""`ppcl evaluate`: measure the teacher, every variant, and every variant as it was before distillation."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ppcl_ds import launch, memory
from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import track
from ppcl_ds.early import UNDISTILLED, finetuned
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.compared import SetFigures, compare
from ppcl_ds.evaluate.drawing import Images, draw_sets
from ppcl_ds.evaluate.figures import Bench, ModelFigures
from ppcl_ds.evaluate.layouts import Laid, read_set
from ppcl_ds.evaluate.official import read_scores
from ppcl_ds.evaluate.painter import fits
from ppcl_ds.evaluate.report import Figures, draw_samples, read_report, save_pictures, show_sets
from ppcl_ds.evaluate.scores import Scorer, open_scorer
from ppcl_ds.export.card import write_card
from ppcl_ds.export.load import load_model
from ppcl_ds.export.model_folder import FACTS, weights_digest
from ppcl_ds.export.placing import placed
from ppcl_ds.prompt_sets import Score
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.encoding import Decoder
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.units.plan import Plan, load_plan
from ppcl_ds.units.variant import assembled


@dataclass(frozen=True)
class Checked:
    """What is there to evaluate.

    Attributes:
        sets: prompt sets, read.
    """

    recipe: Recipe
    teacher: Teacher
    plan: Plan
    sets: Sequence[Laid]

    @property
    def drawn(self) -> list[str]:
        """The models that draw prompt sets: those that users would use."""
        tuned = [name for variant in self.plan.variants for name in (finetuned(variant), variant)]
        return ["teacher", *(name for name in tuned if (self.recipe.pruned(name) / "config.json").exists())]


def check(recipe: Recipe) -> Checked:
    """Everything that can be wrong before a model is loaded.

    Raises:
        UserError: one line that says what.
    """
    launch.check_world(None)
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    for variant in plan.variants:
        if not any((recipe.pruned(name) / "config.json").exists() for name in (variant, finetuned(variant))):
            raise UserError(f"{recipe.pruned(variant)} is missing; run `ppcl consolidate RECIPE` first")
    if launch.is_first_rank():  # which will take the scores: hours later would be late for a missing model
        _scorers(recipe, torch.device("cpu"))
    return Checked(recipe, teacher, plan, [read_set(each, recipe.run) for each in recipe.evaluate.sets])


def evaluate(checked: Checked) -> None:
    """Draw the prompt sets on all ranks; on the first, measure, write report and cards, print the table."""
    recipe, teacher, plan = checked.recipe, checked.teacher, checked.plan
    drawn = Images(recipe, teacher, checked.drawn, checked.sets) if checked.sets else None
    if drawn and not draw_sets(drawn):
        return
    if not launch.is_first_rank():
        return
    device = launch.device()
    whole = fits(recipe, teacher, device, around=False)
    if not whole:
        print("the teacher does not fit on one GPU: its layers stay in CPU memory, and figures take longer", flush=True)
    bench = Bench(recipe, teacher, device, whole)
    decode = Decoder(recipe.teacher.folder, device)
    rows: list[ModelFigures] = []
    images: dict[str, Tensor] = {}
    models = list(_models(recipe, teacher, plan))
    for name, load in track(models, "evaluate", len(models)):
        with memory.phase(f"figures of {name}"), placed(load(), device, whole) as model:
            figures, images[name] = bench.measure(name, model, decode)
        del model  # before there is another on the device
        if (recipe.pruned(name).parent / FACTS).exists():
            figures.weights = weights_digest(recipe.pruned(name).parent)
        rows.append(figures)
    margins = {score.score: score.margin for score in recipe.evaluate.scores}
    sets = compare(drawn, _scorers(recipe, device), margins) if drawn else []
    draw_samples(images, bench.captions, recipe.run / "samples.png")
    save_pictures(images, bench.captions, recipe.run)
    with suppress(UserError):  # none yet, or another release's
        sets = _with_official(sets, read_report(recipe.run / "report.json").sets)
    _write(recipe, Figures(models=rows, sets=sets, facts=_facts(recipe, teacher, device, whole)))
    _show(rows)
    show_sets(sets)
    print(f"wrote samples.png, samples/ and report.json into {recipe.run}")


def _with_official(sets: Sequence[SetFigures], before: Sequence[SetFigures]) -> list[SetFigures]:
    """What official scorers have said of the very images that are there now."""
    found = []
    for now in sets:
        old = next((each for each in before if each.name == now.name and _drawn_as(each) == _drawn_as(now)), None)
        official = old.official if old else {}
        kept = {model: said for model, said in official.items() if old and old.weights.get(model) == now.weights[model]}
        found.append(now.model_copy(update={"official": kept}))
    return found


def _drawn_as(figures: SetFigures) -> str:
    """How images were drawn, as words; releases of packages change none that is there."""
    return json.dumps({name: value for name, value in figures.settings.items() if name != "versions"}, sort_keys=True)


def take_scores(recipe: Recipe, given: Sequence[str]) -> None:
    """Take official scorers' result files, `SET/MODEL=FILE` each, into report and cards.

    Raises:
        UserError: one cannot be read, or what it is of has not been evaluated; nothing is written then.
    """
    figures = read_report(recipe.run / "report.json")
    sets = {each.name: each for each in figures.sets}
    for line in given:
        name, model, scores = read_scores(line, recipe.evaluate.sets)
        if name not in sets:
            raise UserError(f"--read-scores {line}: set '{name}' is not drawn yet; run `ppcl evaluate RECIPE` first")
        if model not in {row.name for row in figures.models}:
            known = ", ".join(row.name for row in figures.models)
            raise UserError(f"--read-scores {line}: no model '{model}' was evaluated; known: {known}")
        official = {**sets[name].official, model: {**sets[name].official.get(model, {}), **scores}}
        sets[name] = sets[name].model_copy(update={"official": official})
        print(f"{name}, {model}: " + ", ".join(f"{score} {value:.4g}" for score, value in scores.items()))
    _write(recipe, figures.model_copy(update={"sets": [sets[each.name] for each in figures.sets]}))
    print(f"wrote report.json into {recipe.run}")


def _write(recipe: Recipe, figures: Figures) -> None:
    """Report and cards."""
    atomic_write(recipe.run / "report.json", figures.model_dump_json(indent=1) + "\n")
    for row in figures.models:
        rows = [each.model_dump() for each in figures.models]
        write_card(recipe.pruned(row.name).parent, rows, [each.model_dump() for each in figures.sets])


def _scorers(recipe: Recipe, device: torch.device) -> list[Scorer]:
    """The recipe's scores; how near images are to the teacher's always is one."""
    scores = [*recipe.evaluate.scores]
    if recipe.evaluate.sets and not any(score.score == "psnr" for score in scores):
        scores.append(Score(score="psnr"))
    return [open_scorer(score, device) for score in scores]


def _models(recipe: Recipe, teacher: Teacher, plan: Plan) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and loader of every model; each is loaded when its turn comes, so one at a time is in memory."""
    dtype = DTYPES[recipe.teacher.precision]
    yield "teacher", partial(load_model, teacher.files.folder, dtype)
    for variant in plan.variants:
        for name in (finetuned(variant), variant):
            if (recipe.pruned(name) / "config.json").exists():
                yield name, partial(load_model, recipe.pruned(name), dtype)
        yield variant + UNDISTILLED, partial(_undistilled, teacher, plan, variant, dtype)


def _undistilled(teacher: Teacher, plan: Plan, variant: str, dtype: torch.dtype) -> nn.Module:
    model = assembled(teacher, plan, variant, None)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(teacher.files.runs_as(name, dtype))
    return model


def _facts(recipe: Recipe, teacher: Teacher, device: torch.device, whole: bool) -> dict[str, str]:
    settings = recipe.evaluate
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    return {
        "Teacher": f"{teacher.class_name} from {teacher.files.folder}",
        "Images": f"{settings.samples} a model, {settings.steps} steps, guidance {settings.guidance:g}, "
        f"seed {recipe.seed}; few-step: {settings.few_steps} steps",
        "Distillation": f"{recipe.distill.steps} steps of "
        f"{recipe.distill.micro_batch * recipe.distill.micro_batches_per_step} samples",
        "Latency": f"one forward of one sample on {name}, {threads} CPU thread{'s' if threads > 1 else ''}, "
        f"{recipe.teacher.precision}" + ("" if whole else ", weights on their way from CPU memory counted in"),
    }


def _show(rows: list[ModelFigures]) -> None:
    # 80 letters hold no more; the page does.
    columns = ("params", "blocks", "ms", "acc.", "Fréchet", "velocity", "sample")
    table = Table("model", *columns, box=SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for m in rows:
        table.add_row(
            escape(m.name),
            f"{m.params / 1e6:.2f}M",
            f"{m.block_params_ratio:.0%}",
            f"{m.latency_ms:.1f}",
            "-" if m.accuracy is None else f"{m.accuracy:.1%}",
            "-" if m.frechet is None else f"{m.frechet:.3f}",
            f"{m.velocity_mse:.4f}",
            f"{m.sample_mse:.4f}",
        )
    Console().print(table)
