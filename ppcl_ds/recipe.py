"""The recipe: one YAML file that says everything about a run, checked before anything starts."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ppcl_ds.errors import UserError, brief
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
        return self.run / "pruned" / variant / "transformer"

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
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"DeepSpeed file {path}: {fault}") from None


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: the file is missing, is not YAML, or has a wrong key or value; the message names the key.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as fault:
        raise UserError(
            f"recipe {path}: {fault.strerror}; give the path of a recipe such as recipes/digits.yaml"
        ) from None
    except yaml.YAMLError as fault:
        raise UserError(f"recipe {path}: not valid YAML: {brief(fault)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: expected keys and values, found {type(raw).__name__}")
    try:
        return Recipe.model_validate(_fill_in_run(raw, str(raw.get("run", ""))))
    except ValidationError as fault:
        raise UserError(f"recipe {path}: " + "; ".join(_explain(error) for error in fault.errors())) from None


def open_run(path: Path) -> Recipe:
    """A recipe file, or the recipe that a run folder was trained with.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not path.is_dir():
        return load_recipe(path)
    written = [folder.recipe for folder in TrainingFolder.all_of(path)]
    trained = next(filter(Path.exists, written), written[0])
    try:
        # The folder may have been moved since: what lies in it is read from where it is now.
        return Recipe.model_validate_json(trained.read_bytes()).model_copy(update={"run": path})
    except OSError:
        raise UserError(f"{path} is not the folder of a run that was trained: {trained} is missing") from None
    except ValidationError as fault:
        raise UserError(f"{trained} cannot be read ({brief(fault)}); give the recipe file") from None


def _fill_in_run(node: Any, run: str) -> Any:
    if isinstance(node, dict):
        return {key: _fill_in_run(value, run) for key, value in node.items()}
    return node.replace("{run}", run) if isinstance(node, str) else node


def _explain(error: Any) -> str:
    """One pydantic error as words, with the nearest known key for an unknown one."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(Recipe, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
