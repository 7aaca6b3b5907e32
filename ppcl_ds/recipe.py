"""The recipe: one YAML file that says everything about a run, checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ppcl_ds.errors import UserError, brief, missing
from ppcl_ds.recipe_errors import explain
from ppcl_ds.recipe_file import SET, RecipeFile, read_recipe_file
from ppcl_ds.sections import (
    Cluster,
    Data,
    DeepSpeedFiles,
    DemoTeacher,
    Distill,
    Evaluate,
    Finetune,
    Noise,
    Plan,
    Probe,
    Section,
    Teacher,
    Topology,
    Wandb,
)


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint after a step."""
    return f"step-{step:06d}"


@dataclass(frozen=True)
class TrainingFolder:
    """What a training writes: the folder of `ppcl distill`, or of one variant's `ppcl finetune`.

    Attributes:
        command: the command, and the recipe's section of it.
        variant: of a fine-tuning.
    """

    run: Path
    command: Literal["distill", "finetune"]
    variant: str = ""

    @classmethod
    def all_of(cls, run: Path) -> list[TrainingFolder]:
        """Those of a run: of its distillation, whether that has begun or not, and of every fine-tuning."""
        tuned = sorted(path.name for path in (run / "finetune").glob("*"))
        return [cls(run, "distill"), *(cls(run, "finetune", variant) for variant in tuned)]

    @property
    def path(self) -> Path:
        return self.run / self.command / self.variant

    @property
    def checkpoints(self) -> Path:
        """What is trained."""
        return self.path / "checkpoints"

    @property
    def plan(self) -> Path:
        """The plan as it was when training began; its units are those in the checkpoints."""
        return self.path / "plan.yaml"

    @property
    def recipe(self) -> Path:
        """The recipe as it was when training began; beside it, a digest of the shards that it began with."""
        return self.path / "recipe.json"

    @property
    def board(self) -> Path:
        return self.path / "tensorboard"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.checkpoints / "latest").exists()

    def finished(self, steps: int) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        return self.begun and (self.checkpoints / "latest").read_text().strip() == checkpoint_tag(steps)


class Recipe(Section):
    """One run, from images to pruned models. Read `recipes/digits.yaml` for a commented example."""

    run: Path
    """Folder of this run; `{run}` in other paths stands for it."""
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Have a GPU repeat a run to the same bits: attention's backward then adds in a fixed order, which takes more time.
    A CPU always does."""
    data: Data
    teacher: Teacher
    noise: Noise = Noise()
    probe: Probe = Probe()
    plan: Plan
    topology: Topology = Topology()
    distill: Distill
    finetune: Finetune | None = None
    evaluate: Evaluate = Evaluate()
    deepspeed: DeepSpeedFiles = DeepSpeedFiles()
    cluster: Cluster = Cluster()
    wandb: Wandb | None = None
    demo: DemoTeacher | None = None

    @property
    def probe_folder(self) -> Path:
        """What `ppcl probe` found."""
        return self.run / "probe"

    @property
    def plan_file(self) -> Path:
        return self.run / "plan.yaml"

    @property
    def swaps_file(self) -> Path:
        """What `ppcl plan --from-run` has measured."""
        return self.run / "plan" / "swaps.json"

    @property
    def distillation(self) -> TrainingFolder:
        """What `ppcl distill` writes."""
        return TrainingFolder(self.run, "distill")

    def finetuning(self, variant: str) -> TrainingFolder:
        """What `ppcl finetune --variant VARIANT` writes."""
        return TrainingFolder(self.run, "finetune", variant)

    @property
    def tuning(self) -> Finetune:
        """The section `finetune`.

        Raises:
            UserError: there is none.
        """
        if self.finetune is None:
            raise UserError("the recipe has no section 'finetune', which says how long and on how many samples")
        return self.finetune

    @property
    def distilled(self) -> bool:
        return self.distillation.finished(self.distill.steps)

    @property
    def bad_samples(self) -> Path:
        """Samples that were skipped, a line each."""
        return self.run / "bad_samples.log"

    def pruned(self, variant: str) -> Path:
        """The transformer folder of a variant, which `ppcl consolidate` writes."""
        return self.run / "pruned" / variant / self.teacher.component

    @model_validator(mode="after")
    def _plans_what_is_probed(self) -> Recipe:
        if self.plan.max_span > self.probe.max_span:
            raise ValueError(
                f"plan.max_span is {self.plan.max_span}, but only spans of up to probe.max_span = "
                f"{self.probe.max_span} blocks are measured; raise probe.max_span, or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _tunes_what_it_plans(self) -> Recipe:
        tuned = self.finetune.variants if self.finetune else ()
        unknown = [name for name in tuned if name not in self.plan.variants]
        if unknown and self.plan.rule != "given":  # whose variants stand in another file
            raise ValueError(f"finetune.variants names '{unknown[0]}', which is not in plan.variants")
        if self.finetune and not self.finetune.flow_weight + self.finetune.velocity_weight:
            raise ValueError("finetune.flow_weight and finetune.velocity_weight are both 0; give one of them a weight")
        if self.finetune and self.finetune.trajectories and self.finetune.flow_weight:
            raise ValueError("finetune.flow_weight needs images, and finetune.trajectories reads none; set it to 0")
        return self

    @model_validator(mode="after")
    def _fits_the_topology(self) -> Recipe:
        world = self.topology.world
        for name, training in (("distill", self.distill), ("finetune", self.finetune)):
            per_step = training.micro_batches_per_step if training else world
            if per_step % world:
                raise ValueError(
                    f"{name}.micro_batches_per_step is {per_step}, not a multiple of topology.stages x "
                    f"topology.replicas = {world}; use {max(world, per_step // world * world)}"
                )
        copy = self.teacher.ranks_per_copy
        if copy and world % copy:
            raise ValueError(f"teacher.ranks_per_copy is {copy}, which does not divide the {world} processes")
        return self


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"DeepSpeed file {missing(path)}") from None
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"DeepSpeed file {path}: {brief(fault)}") from None


def teacher_config(recipe: Recipe) -> dict[str, Any]:
    """The teacher's DeepSpeed file, with what the recipe says of CPU memory unless the file says it itself.

    Raises:
        UserError: it is missing or not JSON, or the teacher is to be in two places.
    """
    path = recipe.deepspeed.teacher
    config = read_deepspeed_file(path)
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        raise UserError(f"DeepSpeed file {path}: it has no zero_optimization; see ds_configs/teacher_zero3.json")
    if recipe.teacher.offload:
        zero = {"offload_param": {"device": recipe.teacher.offload, "pin_memory": True}} | zero
        config |= {"zero_optimization": zero}
    asked = zero.get("offload_param") or {}
    if recipe.teacher.ranks_per_copy == 1 and asked.get("device", "none") != "none":
        raise UserError(
            "teacher.ranks_per_copy: 1 has every process hold the teacher on its accelerator, but teacher.offload or "
            f"offload_param in {path} has it in CPU memory; leave one of them out"
        )
    return config


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: `KEY=VALUE` each, which count more than what the file says; see `recipe_file`.

    Raises:
        UserError: the file is missing, is not YAML, or has a wrong key or value; the message names key and line.
    """
    return checked(path, read_recipe_file(path, changes))


def checked(path: Path, file: RecipeFile) -> Recipe:
    """The recipe that a file says.

    Raises:
        UserError: a wrong key or value; the message names key and line.
    """
    raw = file.raw
    try:
        return Recipe.model_validate(_with_texts(raw, lambda text: text.replace("{run}", str(raw.get("run", "")))))
    except ValidationError as fault:
        whys = [explain(error, file.lines, Recipe, _GONE) for error in fault.errors()]
        more = f"; and {len(whys) - _TOLD} more" if len(whys) > _TOLD else ""
        raise UserError(f"recipe {path}: {'; '.join(whys[:_TOLD])}{more}") from None


def open_run(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe file, or the recipe that a run folder was trained with.

    Raises:
        UserError: there is none, or it cannot be read; or a run folder's recipe is to be changed.
    """
    if not path.is_dir():
        return load_recipe(path, changes)
    if changes:
        raise UserError(f"{SET} {changes[0]}: {path} is the folder of a run, which has its own recipe; give the file")
    written = [folder.recipe for folder in TrainingFolder.all_of(path)]
    trained = next(filter(Path.exists, written), written[0])
    try:
        # The folder may have been moved since: what lies in it is read from where it is now.
        return written_recipe(trained.read_bytes(), run=path)
    except OSError:
        raise UserError(f"{path} is not the folder of a run that was trained: {trained} is missing") from None
    except (ValueError, TypeError, KeyError) as fault:
        raise UserError(f"{trained} cannot be read ({brief(fault)}); give the recipe file") from None


def written_recipe(content: bytes, run: Path | None = None) -> Recipe:
    """The recipe that a training wrote, whatever release it was; keys that are gone count for nothing.

    Args:
        run: where the run folder is now, and so all that was in it; None: where it was.

    Raises:
        ValueError: it is damaged, or no recipe.
    """
    raw = json.loads(content)
    for *sections, key in _GONE:
        node = raw
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(key, None)
    if run:
        before, now = str(raw["run"]), str(run)
        raw = _with_texts(raw, lambda text: now + text[len(before) :] if f"{text}/".startswith(f"{before}/") else text)
    return Recipe.model_validate(raw)


def _with_texts(node: Any, change: Callable[[str], str]) -> Any:
    """The same tree with every text in it changed."""
    if isinstance(node, dict):
        return {key: _with_texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_texts(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


_TOLD = 10
"""Faults of a recipe that are told at once."""

_GONE = {
    ("data", "pipeline"): "the pipeline is teacher.path, and it encodes the data",
    ("data", "captions"): "the pipeline at teacher.path says how captions are encoded, with teacher.options",
    ("data", "images", "encoder"): "the VAE of the pipeline at teacher.path encodes images",
    ("data", "images", "channels"): "the VAE of the pipeline at teacher.path says how many there are",
    ("noise", "shift"): "the scheduler of the pipeline at teacher.path shifts noise levels",
}
"""Keys of earlier releases, and what answers them now."""
