"""The recipe: one YAML file that says everything about a run, checked before anything starts."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ppcl_ds.errors import UserError

Precision = Literal["fp32", "bf16"]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A part of a whole, 0 included, 1 excluded."""


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint behind a step."""
    return f"step-{step:06d}"


def shipped(name: str) -> Path:
    """A recipe or DeepSpeed file that ships with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).exists() else package.parent / name


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageEncoding(Section):
    """How images become latents."""

    encoder: Literal["pixels"] = "pixels"
    """`pixels`: the image itself is the latent, scaled to [-1, 1]."""
    channels: Literal[1, 3] = 3
    """Colour channels kept: 1 (grey) or 3 (RGB)."""
    size: int = Field(gt=0)
    """Height and width in pixels; images of another size are resized."""


class CaptionEncoding(Section):
    """How captions become prompt embeddings."""

    encoder: Literal["table"] = "table"
    """`table`: one fixed random vector for each word."""
    width: int = Field(gt=0)
    """Channels of the prompt embedding (the teacher's `joint_attention_dim`)."""
    pooled_width: int = Field(default=0, ge=0)
    """Channels of the pooled embedding (the teacher's `pooled_projection_dim`); 0 for families without one."""
    max_tokens: int = Field(default=0, ge=0)
    """0: every caption keeps its own length and comes with a mask. Otherwise all are padded to this many tokens,
    as families without a text mask (FLUX, SD3) were trained to read them."""

    @property
    def masked(self) -> bool:
        """Whether captions keep their own length and come with a mask."""
        return self.max_tokens == 0


class Data(Section):
    """Text-image pairs: where they come from, how they are encoded, where the shards lie."""

    source: Path
    """Folder of images, each with its caption in a `.txt` file of the same name."""
    shards: Path
    """Folder that `ppcl-data shard` (into `raw/`) and `ppcl-data encode` (into `encoded/`) write."""
    samples_per_shard: int = Field(default=1000, gt=0)
    heldout: Share = 0.1
    """Share of samples kept out of training, chosen by a stable hash of their key."""
    images: ImageEncoding
    captions: CaptionEncoding


class Teacher(Section):
    """The frozen model."""

    path: Path
    """A diffusers transformer folder (`config.json` and safetensors), or a pipeline folder that has `transformer/`."""
    precision: Precision = "bf16"
    """Number format of teacher and units while they run; masters and optimizer state are always float32."""
    ranks_per_copy: int | None = Field(default=None, gt=1)
    """So many neighbouring processes hold a copy of the teacher between them (ZeRO++ hpZ). Default: those of one node,
    so that forwards stay off the network. The number of all: one copy over all nodes, where nodes are small."""


class Noise(Section):
    """Which noise levels are drawn, for probing and training alike."""

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Density of the timesteps (diffusers' `compute_density_for_timestep_sampling`)."""
    uniform_share: Share = 0.0
    """This share of the timesteps is drawn uniformly instead, so that both ends are seen."""
    shift: float = Field(default=1.0, gt=0)
    """Time shift of the flow-matching scheduler (1: none; Qwen-Image and FLUX at 1024 px: about 3)."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the empty one, so that guided sampling stays right."""


class Probe(Section):
    """How much of the data `ppcl probe` looks at."""

    batch_size: int = Field(default=32, gt=0)
    """Samples in one teacher forward."""
    batches: int = Field(default=16, gt=0)
    """Teacher forwards to fit the probes on, over all ranks; as many again, on other samples, measure them."""
    ridge: float = Field(default=1e-6, ge=0)
    """Ridge term of the least squares, relative to the mean diagonal of the Gram matrix."""


class Plan(Section):
    """Which variants to make."""

    variants: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]]
    """Name of each variant and the share of the teacher's block parameters that it gives up."""
    rule: Literal["error", "ppcl"] = "error"
    """Where spans may lie. `error`: anywhere, the least total `error(u, v)`. `ppcl`: the paper's spans only."""
    max_span: int = Field(default=6, ge=2)
    """Longest span, in blocks, that rule `error` considers."""


class Topology(Section):
    """How the processes are laid out: `stages` x `replicas`, one process per accelerator."""

    stages: int = Field(default=1, gt=0)
    """Pipeline stages that share the library of units."""
    replicas: int = Field(default=1, gt=0)
    """Data replicas of every stage."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.stages * self.replicas


class Optimizer(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.02, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    clip_norm: float = Field(default=1.0, ge=0)
    """Longest gradient of a unit, each for itself; 0: no clipping."""
    offload: bool = False
    """Keep masters and moments in CPU memory: 12 bytes a parameter less on the accelerator, slower steps."""


class DeepSpeedFiles(Section):
    """DeepSpeed JSON files; what the recipe decides (batch, precision) is filled in, the rest is yours."""

    teacher: Path = shipped("ds_configs/teacher_zero3.json")
    students: Path = shipped("ds_configs/students_pipeline.json")


class Distill(Section):
    """The local phase: every unit against the teacher's boundaries."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    micro_batch: int = Field(gt=0)
    """Samples in one teacher forward."""
    micro_batches_per_step: int = Field(gt=0)
    """Micro-batches in one optimizer step, over all processes: a multiple of stages x replicas.
    The global batch is `micro_batch * micro_batches_per_step`, whatever the topology."""
    magnitude_weight: float = Field(default=1.0, ge=0)
    """Weight of the token-norm term beside the direction term (direction alone lets norms shrink)."""
    activation_checkpointing: bool = False
    """Recompute a unit's attention and feed-forward in its backward pass: less memory, about a third more time."""
    optimizer: Optimizer = Optimizer()
    log_every: int = Field(default=10, gt=0)
    """Steps between TensorBoard points."""
    sample_every: int = Field(default=0, ge=0)
    """Steps between pictures of teacher against variants in TensorBoard; 0: none."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """So many of the newest checkpoints stay; older ones are deleted."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds without progress after which a run ends and names the process that the others wait for."""


class Evaluate(Section):
    """Teacher and variants side by side on the same noise."""

    samples: int = Field(default=64, gt=0)
    """Pictures drawn by each model."""
    batch_size: int = Field(default=16, gt=0)
    steps: int = Field(default=20, gt=0)
    """Sampling steps."""
    guidance: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance scale; 1: none."""
    velocity_batches: int = Field(default=8, gt=0)
    """Held-out batches for the velocity error."""
    judge: str = ""
    """`module:function` that scores pictures: called with images (N, C, H, W) in [-1, 1] and their captions,
    returns `{"accuracy": ..., "frechet": ...}`. Empty: those columns are left out."""


class DemoTeacher(Section):
    """The demo's own teacher, trained from scratch."""

    config: dict[str, Any]
    """Configuration of the diffusers transformer class."""
    steps: int = Field(gt=0)
    batch_size: int = Field(default=64, gt=0)
    lr: float = Field(default=2e-3, gt=0)
    ema: Share = 0.998


class Recipe(Section):
    """One run, from images to pruned models. Read `recipes/digits.yaml` for a commented example."""

    run: Path
    """Folder of this run; `{run}` in other paths stands for it."""
    seed: int = 0
    data: Data
    teacher: Teacher
    noise: Noise = Noise()
    probe: Probe = Probe()
    plan: Plan
    topology: Topology = Topology()
    distill: Distill
    evaluate: Evaluate = Evaluate()
    deepspeed: DeepSpeedFiles = DeepSpeedFiles()
    demo: DemoTeacher | None = None

    @property
    def probe_folder(self) -> Path:
        """What `ppcl probe` found."""
        return self.run / "probe"

    @property
    def plan_file(self) -> Path:
        """What `ppcl plan` chose."""
        return self.run / "plan.yaml"

    @property
    def checkpoints(self) -> Path:
        """What `ppcl distill` trained."""
        return self.run / "distill" / "checkpoints"

    @property
    def trained_plan(self) -> Path:
        """The plan as it was when training began; its units are those in the checkpoints."""
        return self.run / "distill" / "plan.yaml"

    @property
    def trained_recipe(self) -> Path:
        """This recipe as it was when training began; beside it, a digest of the shards that it began with."""
        return self.run / "distill" / "recipe.json"

    @property
    def distilled(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        latest = self.checkpoints / "latest"
        return latest.exists() and latest.read_text().strip() == checkpoint_tag(self.distill.steps)

    @property
    def board(self) -> Path:
        """TensorBoard of `ppcl distill`."""
        return self.run / "distill" / "tensorboard"

    def pruned(self, variant: str) -> Path:
        """The transformer folder of a variant, which `ppcl consolidate` writes."""
        return self.run / "pruned" / variant / "transformer"

    @model_validator(mode="after")
    def _fits_the_topology(self) -> Recipe:
        per_step, world = self.distill.micro_batches_per_step, self.topology.world
        if per_step % world:
            raise ValueError(
                f"distill.micro_batches_per_step is {per_step}, not a multiple of topology.stages x "
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
        raise UserError(f"recipe {path}: not valid YAML: {' '.join(str(fault).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: expected keys and values, found {type(raw).__name__}")
    try:
        return Recipe.model_validate(_fill_in_run(raw, str(raw.get("run", ""))))
    except ValidationError as fault:
        raise UserError(f"recipe {path}: " + "; ".join(_explain(error) for error in fault.errors())) from None


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
