"""What the pretended accelerator runs: teachers of any size that are shapes alone, their recipes, plans and samples.

A teacher of which nothing is computed costs its number of blocks and not its width: where others say "small", these
have few blocks of the published width. Only what lies in CPU memory (offload) is real, and wants a narrow one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset as wds
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.index import Index, describe, scan
from ppcl_ds.data.stored import Stored, Texts
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.weightless import WithoutWeights
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.spec import Stream
from tests.conftest import FLUX_1, QWEN_IMAGE, write_config
from tests.families.pipelines import make_pipeline

WAN: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 40,
    "attention_head_dim": 128,
    "num_attention_heads": 40,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
"""The published Wan 2.1 T2V 14B transformer."""

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("QwenImageTransformer2DModel", QWEN_IMAGE),
    "flux": ("FluxTransformer2DModel", FLUX_1),
    "wan": ("WanTransformer3DModel", WAN),
}
"""Family -> class and configuration of the published transformer."""

BOTH: tuple[Stream, ...] = ("image", "text")
SAMPLES = 16
"""Of each split."""


@dataclass(frozen=True)
class Case:
    """One rank of one run.

    Attributes:
        what: `distill`, `finetune`, `swaps` (the measurements of `ppcl plan --from-run`) or `probe`.
        blocks: of the teacher, FLUX.1's of both kinds alike; 0: as many as the published one has.
        heads: 0: as many as the published one has.
        tokens: of Qwen-Image's captions, by turns, as an estimate takes them by default; the others' all have 512.
        size: of the pictures, which are squares; but for Wan's a pixel is a latent.
        frames: of clips.
        plan: units of which kinds.
        teacher_offload: whether the teacher lies in CPU memory.
        units_at_most: of a plan of depth units; 0: as many as there are spans.
        uses: of each reading of the teacher; of more than one, two readings are kept.
        ring_offload: whether these lie in CPU memory.
        mistake: a device mix-up, or something slow, that is put in on purpose, see `rank.py`.
        then: what else is done after the steps: `look`, `save`.
        drawing_steps: of the sampler, for images.
        gib: memory of the accelerator.
        at_once: blocks whose sums probing has in memory; 0: as many as there is room for.
        whole: whether every rank has the whole teacher.
        steps: of a training, of which the last one is seen; by the second all is settled.
        zero: changes to `zero_optimization` of the teacher's DeepSpeed file.
    """

    what: Literal["distill", "finetune", "swaps", "probe"] = "distill"
    family: Literal["qwen", "flux", "wan"] = "qwen"
    blocks: int = 6
    heads: int = 0
    rank: int = 0
    stages: int = 2
    replicas: int = 1
    ranks_per_node: int = 8
    micro_batch: int = 2
    rounds: int = 2
    tokens: tuple[int, ...] = (23,)
    size: int = 128
    frames: int = 1
    plan: Literal["depth", "width", "published"] = "depth"
    checkpointing: bool = True
    offload: bool = False
    teacher_offload: bool = False
    units_at_most: int = 0
    uses: int = 1
    ring_offload: bool = False
    boundary: float = 0.0
    ema: float = 0.0
    mistake: str = ""
    drawing_steps: int = 2
    gib: float = 80.0
    at_once: int = 2
    whole: bool = False
    then: tuple[str, ...] = ()
    steps: int = 3
    zero: tuple[tuple[str, int], ...] = ()

    @property
    def world(self) -> int:
        return self.stages * self.replicas

    @property
    def ends(self) -> tuple[int, ...]:
        """The first ranks of the first and of the last stage."""
        return tuple(sorted({0, self.world - self.replicas}))

    def written(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Case:
        raw = json.loads(text)
        lists = {name: tuple(raw[name]) for name in ("tokens", "then")}
        return cls(**raw | lists | {"zero": tuple((key, value) for key, value in raw["zero"])})

    @property
    def config(self) -> dict[str, Any]:
        """The teacher's `config.json`."""
        name, config = PUBLISHED[self.family]
        lengths = {key: self.blocks or config[key] for key in ("num_layers", "num_single_layers") if key in config}
        heads = {"num_attention_heads": self.heads or config["num_attention_heads"]}
        narrow = {"joint_attention_dim": 64} if self.heads else {}
        return {"_class_name": name} | config | lengths | heads | narrow

    def write(self, folder: Path) -> Recipe:
        """Teacher, samples, DeepSpeed file and plan; every rank of a run may read the same ones."""
        config = self.config
        write_teacher(folder / "teacher", self.family, config)
        recipe = self.recipe(folder)
        zero = json.loads(recipe.deepspeed.teacher.read_text())
        zero["zero_optimization"] |= dict(self.zero)
        (folder / "teacher.json").write_text(json.dumps(zero))
        write_samples(recipe, Size(self.size, self.size, self.frames), self.tokens)
        if self.plan == "published":
            recipe.plan_file.write_text(Path("plans/qwen_image_published.yaml").read_text())
        else:
            self.units(config).save(recipe.plan_file)
        return self.recipe(folder)

    def recipe(self, folder: Path) -> Recipe:
        training = {
            "steps": 100,
            "micro_batch": self.micro_batch,
            "micro_batches_per_step": self.rounds * self.world,
            "activation_checkpointing": self.checkpointing,
            "optimizer": {"offload": self.offload},
            "sample_every": 100 if "look" in self.then else 0,
        }
        written = folder / "teacher.json"
        return Recipe.model_validate(
            {
                "run": folder,
                "data": {
                    "source": "nowhere",
                    "shards": folder / "shards",
                    "images": {"size": self.size, "frames": self.frames},
                    "workers": 0,
                },
                "teacher": {"path": folder / "teacher", "offload": "cpu" if self.teacher_offload else None}
                | ({"ranks_per_copy": 1} if self.whole else {}),
                "noise": {"caption_dropout": 0.0},
                "probe": {
                    "batch_size": 2,
                    "batches": 2 * self.world,
                    "blocks_at_once": self.at_once or None,
                    "max_span": 3,
                },
                "plan": {"variants": {"small": 0.4}, "max_span": 3, "prompts": 4},
                "topology": {"stages": self.stages, "replicas": self.replicas},
                "distill": training
                | {
                    "calibration_steps": 1,
                    "replay": {"uses": self.uses, "ring": 2, "offload": self.ring_offload},
                },
                "finetune": training | {"boundary_weight": self.boundary, "ema": self.ema},
                "evaluate": {
                    "samples": 4,
                    "batch_size": 2,
                    "steps": self.drawing_steps,
                    "guidance": 4.0,
                    "velocity_batches": 2,
                    "few_steps": 2,
                },
                "deepspeed": {"teacher": written} if written.exists() else {},
            }
        )

    def units(self, config: dict[str, Any]) -> Plan:
        """Depth units on threes of blocks, or twos where there are few; or every kind of unit."""
        streams = BOTH if self.family != "wan" else ("image",)  # its blocks hand on no text
        blocks = config["num_layers"] + config.get("num_single_layers", 0)
        joined = config["num_layers"]  # a span stays inside one list of blocks
        last = blocks - 1 if self.family == "qwen" else None  # nobody reads the text that leaves it
        long = 2 if blocks < 9 else 3
        starts = [first for first in range(0, blocks + 1 - long, long) if not first < joined < first + long]
        spans = [(first, first + long - 1) for first in starts]
        units = [UnitPlan(name=f"unit_{u}", span=(u, v), streams=streams[: 1 if v == last else 2]) for u, v in spans]
        units = units[: self.units_at_most or None]
        if self.plan == "width":
            units = [
                units[0],
                UnitPlan(name="group", kind="text", span=(1, 2), streams=("text",)),
                UnitPlan(name="line", kind="ffn", span=(2, 2), streams=("image",)),
                UnitPlan(name="thin", kind="ffn", span=(0, 0), streams=BOTH, keep=0.25),
            ]
        apart = [unit.name for unit in units if unit.takes_blocks]
        variants = {"small": tuple(apart[:: 2 if self.what == "finetune" and len(apart) > 1 else 1])}
        return Plan(teacher=config["_class_name"], blocks=blocks, units=tuple(units), variants=variants)


def write_teacher(folder: Path, family: str, config: dict[str, Any]) -> None:
    """A pipeline folder of the published shapes around a transformer's configuration, without weights."""
    parts: dict[str, dict[str, Any]] = {}  # but for Qwen-Image's as wide as the tiny transformers
    if family == "wan":
        make_pipeline("wan", folder)
        for weights in folder.glob("*/*.safetensors"):
            weights.unlink()
        channels = config["out_channels"]
        parts["transformer"] = config
        parts["text_encoder"] = {"d_model": config["text_dim"]}
        parts["vae"] = {
            "z_dim": channels,
            "dim_mult": [1, 1, 1, 1],
            "temperal_downsample": [False, True, True],
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
            "latents_mean": [0.0] * channels,
            "latents_std": [1.0] * channels,
        }
    else:
        write_config(folder, family, **config)
    if family == "flux":
        parts = {
            "vae": {"latent_channels": config["in_channels"] // 4},
            "text_encoder": {"hidden_size": config["pooled_projection_dim"]},
            "text_encoder_2": {"d_model": config["joint_attention_dim"]},
        }
    for part, keys in parts.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def write_samples(recipe: Recipe, size: Size, tokens: Sequence[int]) -> None:
    """Encoded shards, one a split, of samples that are all zeros; captions of so many words, by turns."""
    call = PipelineCall(recipe.teacher.path)
    encoded = recipe.data.shards / "encoded"
    encoded.mkdir(parents=True)
    shape = (
        (16, (size.frames + 3) // 4, size.height // 8, size.width // 8)
        if size.frames > 1
        else (16, size.height, size.width)
    )
    latents = torch.zeros(shape)

    def prompt(caption: str | list[str], guidance: float = 1.0) -> Prompt:
        with WithoutWeights():
            found = call.encode(caption, size, guidance=guidance)
        zeros = pytree.tree_map_only(
            Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t, found.text
        )
        return replace(found, text=zeros)

    prompts = [prompt(" ".join(["word"] * count)) for count in tokens]
    entries = []
    for split in ("train", "heldout"):
        path = encoded / f"{split}-000000.tar"
        with path.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for number in range(SAMPLES):
                data = Stored(latents, size, {"": prompts[number % len(prompts)]}).write()
                writer.write({"__key__": f"{split}{number}", "txt": b"nothing", "safetensors": data})
        with path.open("rb") as written:
            found, problems = scan(written)
        assert not problems
        entries.append(describe(path, found, shapes={"x".join(map(str, shape)): list(range(SAMPLES))}))
    guided = prompt("a longer one", 2.0)
    texts = Texts.write(prompt(""), prompt("a longer one"), prompt(["", "a longer one"]), guided)
    (encoded / "texts.safetensors").write_bytes(texts)
    Index(shards=entries).write(encoded / "index.json")
