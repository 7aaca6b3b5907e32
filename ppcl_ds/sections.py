"""The sections of a recipe: what each step of a run can be told, with defaults that work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from ppcl_ds.hub import pipeline_folder
from ppcl_ds.jobs import Cluster as Cluster
from ppcl_ds.plan_section import Objective as Objective
from ppcl_ds.plan_section import Plan as Plan
from ppcl_ds.plan_section import Rule as Rule
from ppcl_ds.prompt_sets import Drawn
from ppcl_ds.sampling import LevelWeights, Replay, Trajectories, Weights
from ppcl_ds.shipped import shipped
from ppcl_ds.strict import Section, expanded
from ppcl_ds.watching import Wandb as Wandb

Precision = Literal["fp32", "bf16"]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]  # a part of a whole, 0 included, 1 excluded


class ImageSizes(Section):
    """Which sizes images are brought to before the pipeline's VAE encodes them.

    Every image goes to the bucket whose aspect ratio is nearest to its own: it is scaled until it covers the bucket,
    and what is left over is centre-cropped.
    """

    size: int = Field(gt=0, le=65536)
    """Buckets have at most size x size pixels."""
    max_aspect: float = Field(default=1.0, ge=1.0, le=100.0)
    """Longest side over shortest side of the longest bucket; 1: one square bucket for all."""
    step: int = Field(default=0, ge=0)
    """Sides of buckets are multiples of it. Default: 64 pixels, or two latents if that is more (less gives more
    buckets, and more of each image stays)."""
    frames: int = Field(default=1, ge=1, le=65536)
    """Most frames of a clip: its first ones, at its own rate, as many as the pipeline's VAE encodes (81, 77, ... by
    fours; LTX by eights). Shorter clips are buckets of their own."""

    @model_validator(mode="after")
    def _has_a_square(self) -> ImageSizes:
        if self.step and self.size % self.step:
            raise ValueError(f"size {self.size} is not a multiple of step {self.step}")
        return self


class Data(Section):
    """Images and clips with captions: where they come from, how they are encoded, where they lie, how they are read."""

    source: str | tuple[str, ...]
    """One or several of: a folder of images or clips, each with its captions in a `.txt` or `.json` of the same name; a
    table (`.jsonl`, `.csv`, `.parquet`) with a column for the image or its path and columns of captions; webdataset
    shards; a folder of any of these; the id of a data set on the Hugging Face hub, `OWNER/NAME`. Names may have braces:
    `/data/train-{000000..000123}.tar`, `https://host/{00..99}.tar`,
    `pipe:aws s3 cp s3://bucket/{00..99}.tar -`. See `docs/data.md`."""
    caption_columns: tuple[str, ...] = ()
    """Columns of a table, or keys of a `.json`, that are captions, the main one first. Default: `caption`, `text`,
    `prompt`, and these with a language or a number: `caption_en`, `text_zh`, `caption_2`."""
    image_suffixes: tuple[str, ...] = ()
    """Which images are read where several have one name, by how their names end, best first, such as `[png, jpg]` or
    `[front.jpg]`; none else is read. Default: all kinds, and several of one name are skipped and named."""
    shards: Path
    """Folder that `ppcl-data shard` (into `raw/`) and `ppcl-data encode` (into `encoded/`) write."""
    samples_per_shard: int = Field(default=1000, gt=0)
    """Most samples in a shard."""
    shard_size: Annotated[ByteSize, Field(gt=0)] = ByteSize(10**9)
    """Largest shard, such as `500MB`."""
    heldout: Share = 0.1
    """Share of samples kept out of training, chosen by a stable hash of their key."""
    longest_side: int = Field(default=0, ge=0)
    """Images with a longer side, in pixels, are made smaller when they are sharded; 0: every image stays as it is."""
    images: ImageSizes
    sizes: Weights = Field(default_factory=dict)
    """Sizes of captions without an image, height x width in pixels, and x frames of a clip, with weights by which they
    are drawn: `{1024x1024: 2, 768x1344: 1, 480x832x81: 1}`. Without it a sample has to have an image or a clip."""
    real_share: Share = 0.0
    """With `trajectories`, this share of the micro-batches is of noisy images all the same."""
    address: str = ""
    """Where training reads the encoded shards, `{name}` standing for the file: `https://host/latents/{name}` or
    `pipe:aws s3 cp s3://bucket/latents/{name} -`. Default: `shards`/encoded/. Their index always lies there."""
    cache: ByteSize = ByteSize(20 * 10**9)
    """Disk that each process may use, in the temporary folder, for shards that come from an `address`."""
    window: int = Field(default=2048, gt=0)
    """Samples of a lane (see `ppcl_ds/data/order.py`) are shuffled by about so many places; each epoch begins with a
    shuffle of the shards."""
    workers: int = Field(default=2, ge=0)
    """Processes, for each training process, that read and decode ahead; 0: the training process does it itself."""
    max_bad_fraction: Share = 0.05
    """Samples that cannot be used are skipped and named; more than this share of them ends the command."""

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, source: Any) -> Any:
        every = [source] if isinstance(source, str) else source
        if not isinstance(every, list | tuple) or not every or not all(isinstance(one, str) and one for one in every):
            raise ValueError("must be a path, an address, or a list of these")
        read = tuple(one if re.match(r"pipe:|\w+://", one) else expanded(one) for one in every)
        return read[0] if isinstance(source, str) else read

    @property
    def sources(self) -> tuple[str, ...]:
        """All that `source` names."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @model_validator(mode="after")
    def _names_the_shards_of_an_address(self) -> Data:
        if self.address and "{name}" not in self.address:
            raise ValueError("address must hold {name}, which stands for the shard's file name")
        return self


class Teacher(Section):
    """The frozen model."""

    path: Path
    """A diffusers pipeline folder, or its id on the Hugging Face hub (`Qwen/Qwen-Image`), fetched into its cache.
    Its transformer is what is pruned; its VAE and text encoders encode the data."""
    component: str = "transformer"
    """The transformer, where the pipeline has two (Wan 2.2: `transformer` or `transformer_2`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the pipeline's call that differ from its own defaults, such as `{max_sequence_length: 256}`.
    `{image: source}` gives a pipeline that may edit an image (FLUX.1 Kontext) that of each sample."""
    precision: Precision = "bf16"
    """Dtype of teacher and units while they run; masters and optimizer state are always float32."""
    ranks_per_copy: int | None = Field(default=None, gt=0)
    """So many neighbouring processes hold a copy of the teacher between them (ZeRO++ hpZ). Default: those of one node,
    so that forwards stay off the network. The number of all: one copy over all nodes, where nodes are small. 1: each
    has all of it, which is fastest; `ppcl estimate` says where it fits."""
    offload: Literal["cpu"] | None = None
    """`cpu`: each process's part lies in pinned CPU memory, and blocks are copied to the accelerator ahead of their
    turn: for cards that the teacher does not fit on. A forward takes at least as long as the copies; large
    micro-batches hide them."""

    @property
    def folder(self) -> Path:
        """Where the pipeline lies on this machine, see `hub.pipeline_folder`."""
        return pipeline_folder(self.path)


class Noise(Section):
    """Which noise levels are drawn, for probing and training alike."""

    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Density of the timesteps (diffusers' `compute_density_for_timestep_sampling`)."""
    uniform_share: Share = 0.0
    """This share of the timesteps is drawn uniformly instead, so that both ends are seen."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the empty one, so that guided sampling stays right."""


class Probe(Section):
    """How much of the data `ppcl probe` looks at, and how far."""

    batch_size: int = Field(default=32, gt=0)
    """Samples in one teacher forward."""
    batches: int = Field(default=32, ge=2)
    """Teacher forwards, over all processes and `--part`s. Probes are fitted on every other one and measured on the
    rest, then the other way round: half of them should have several times more tokens than the teacher has channels."""
    ridge: float = Field(default=1e-6, ge=0)
    """Ridge term of the least squares, relative to the mean diagonal of the Gram matrix."""
    max_span: int = Field(default=8, ge=2)
    """Longest span, in blocks, that is measured; memory and arithmetic grow with it."""
    blocks_at_once: int | None = Field(default=None, gt=0)
    """The sums of so many blocks are in memory at a time; the teacher reads all samples again for the next ones, and
    the result is the same. Default: as many as the memory that is left holds."""


class Topology(Section):
    """How the processes are laid out: `stages` x `replicas`, one process per accelerator."""

    stages: int = Field(default=1, gt=0)
    """Pipeline stages that share the library of units."""
    replicas: int = Field(default=1, gt=0)
    """Data replicas of every stage."""

    @property
    def world(self) -> int:
        return self.stages * self.replicas


class Optimizer(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(default=1e-4, gt=0, le=10.0)
    betas: tuple[Share, Share] = (0.9, 0.95)
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


class Training(Section):
    """What both kinds of training, `ppcl distill` and `ppcl finetune`, can be told."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    micro_batch: int = Field(gt=0)
    """Samples in one teacher forward."""
    micro_batches_per_step: int = Field(gt=0)
    """Micro-batches in one optimizer step, over all processes: a multiple of stages x replicas.
    The global batch is `micro_batch * micro_batches_per_step`, whatever the topology."""
    trajectories: Trajectories | None = None
    """Train on trajectories, the teacher's own or the student's, instead of noisy images; captions are enough."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass (of each unit's attention and feed-forward; of whole blocks when
    fine-tuning): less memory, about a third more time."""
    optimizer: Optimizer = Optimizer()
    log_every: int = Field(default=10, gt=0)
    """Steps between TensorBoard points."""
    sample_every: int = Field(default=0, ge=0)
    """Steps between figures of held-out data in TensorBoard; every tenth time, and at the end, there are images beside
    the teacher's. 0: none."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """So many of the newest checkpoints stay; older ones are deleted."""
    timeout: float = Field(default=600.0, gt=0, le=1e7)
    """Seconds without progress after which a run ends and names the process that the others wait for."""


class Distill(Training):
    """The local phase: every unit against the teacher's boundaries."""

    replay: Replay = Replay()
    start: Literal["first", "mean", "best", "scaled"] = "first"
    """What a depth unit starts from, see `docs/units.md`: the first block of its span; the mean of its blocks' weights;
    the one of its blocks, or the first or its scaled version, that has the least loss on `calibration_steps` steps."""
    start_from: Path | None = None
    """Folder of an earlier run: where trained units of it lie in a span, they stand for its blocks in `start`."""
    keep_pictures: int = Field(default=0, ge=0)
    """About so many finished images of `trajectories` are kept in `{run}/pictures`, as encoded shards."""
    calibration_steps: int = Field(default=8, gt=0)
    """Width units start from least squares on so many steps: several times more tokens than a linear has inputs."""
    compile: bool = False
    """Run units' blocks and losses under torch.compile, which fuses what is done element by element. The first step
    takes minutes longer; a block that does not compile runs as it is, and a line says so. Needs a C++ compiler."""
    magnitude_weight: float = Field(default=1.0, ge=0)
    """Weight of the token-norm term beside the direction term (direction alone lets norms shrink)."""
    level_weights: LevelWeights = Field(default_factory=dict)
    """Weights of samples by noise level: place on the ladder, 0 noise and 1 image, -> weight, linear in between, such
    as `{0: 2, 0.5: 1}`. Without it all weigh 1."""
    branch_weight: float = Field(default=0.0, ge=0)
    """Weight of the error of what the prompt changes; not with `trajectories`. See `docs/units.md`."""

    @model_validator(mode="after")
    def _has_both_branches(self) -> Distill:
        if self.trajectories and self.trajectories.of == "student":
            raise ValueError("trajectories.of: student is for finetune: units have no way of their own; leave it out")
        if self.branch_weight and self.trajectories:
            raise ValueError("branch_weight needs noisy images, which trajectories are not; leave one of them out")
        if self.branch_weight and self.micro_batch == 1:
            raise ValueError("branch_weight compares samples of one micro-batch; set micro_batch to 2 or more")
        return self


class Finetune(Training):
    """End to end: a whole variant, its blocks laid over the stages, real activations between them."""

    variants: tuple[str, ...] = ()
    """Variants that the demo and `ppcl submit` fine-tune; `ppcl finetune --variant` takes any."""
    flow_weight: float = Field(default=0.0, ge=0)
    """Weight of the flow-matching loss: mean squared error from the data's own velocity, noise minus image."""
    velocity_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error from the teacher's velocity."""
    boundary_weight: float = Field(default=0.0, ge=0)
    """Weight of the boundary loss after every unit, as in the local phase; summed over units and streams."""
    trainable: Literal["all", "neighbours", "units"] = "all"
    """What is trained. `units`: what took the place of teacher blocks or parts. `neighbours`: also the teacher's blocks
    just before and after a unit, and what is left of blocks that have width units. `all`: the whole model."""
    kept_lr: float = Field(default=1.0, gt=0)
    """Learning rate of whatever is not a unit, as a multiple of `optimizer.lr`."""
    ema: Share = 0.0
    """Largest decay of a moving average of the weights, which is then what is consolidated; 0: none. After step t it
    is at most (1 + t) / (10 + t). Held-out losses and images are of the weights themselves."""
    quantiles: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Quantiles of the noise levels that training draws (`noise`) at which losses on held-out data are taken, every
    `sample_every` steps."""


class Evaluate(Drawn):
    """Teacher and variants side by side on the same noise; prompt sets and scores are in `ppcl_ds/prompt_sets.py`."""

    samples: int = Field(default=64, gt=0)
    """Images drawn by each model."""
    batch_size: int = Field(default=16, gt=0)
    steps: int = Field(default=20, gt=0)
    """Sampling steps."""
    few_steps: int = Field(default=4, gt=0)
    """Of draws that are only compared with the teacher's, from the same noise and prompt: what `ppcl plan --from-run`
    judges units by, and one of the figures of held-out data."""
    guidance: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance scale; 1: none."""
    velocity_batches: int = Field(default=8, gt=0)
    """Held-out batches for the velocity error."""
    judge: str = ""
    """`module:function` that scores images: called with images (N, C, H, W) in [-1, 1] and their captions,
    returns `{"accuracy": ..., "frechet": ...}`. Empty: those columns are left out."""


class DemoTeacher(Section):
    """The demo's own teacher, trained from scratch."""

    data: Literal["digits", "emoji"] = "digits"
    """What it learns to draw; the demo writes its images and captions to `data.source`."""
    config: dict[str, Any]
    """Configuration of the diffusers transformer class."""
    steps: int = Field(gt=0)
    batch_size: int = Field(default=64, gt=0)
    lr: float = Field(default=2e-3, gt=0)
    ema: Share = 0.998
