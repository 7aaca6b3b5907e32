"""The training step that the paper's authors published, against ours, on the same teacher and the same units.

    python -m benchmarks.published [--json FILE] [--quick]

Theirs is written anew here from its description, as a plain loop in one process: the encoders run in every step, the
teacher runs whole, and every student block runs twice, for its loss and once more for what is logged. Ours is the
engine as users start it, on shards that were encoded once. Both run on the CPU in float32 with one thread.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.plain import Latents, PlainStudents
from benchmarks.ranks import THREADS, run_ranks
from benchmarks.step import EngineStep, time_in_turns
from benchmarks.table import JsonFile, Quick, row_of_pairs, show
from benchmarks.workload import CHANNELS, Span, Workload, prepare

SPANS: list[Span] = [(1, 2), (3, 5), (6, 7), (9, 10)]
"""5 of 12 blocks go, the share that the published Qwen-Image choice takes (25 of 60)."""
VOCABULARY = 4096
"""Tokens that the small text encoder knows."""
DOWNSCALE = 8
"""Pixels of an image along one of its latents."""


class Encoders:
    """A VAE and a text encoder, random, about as large beside the teacher as Qwen-Image's are beside theirs.

    Those have about 0.006 and 0.35 of the 20B teacher's parameters.
    """

    def __init__(self, work: Workload, teacher_parameters: int) -> None:
        from transformers import Qwen2Config, Qwen2Model

        # Stable Diffusion's layout has 84M parameters at 128 channels, and they go with the square of the channels.
        channels = 4 * max(1, round(32 * (0.006 * teacher_parameters / 84e6) ** 0.5))
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
            layers_per_block=2,
            latent_channels=CHANNELS,
            norm_num_groups=4,
        )
        heads = work.width // work.head
        # The proportions of Qwen2.5-VL 7B; so many layers come to 0.35 of the teacher.
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=work.width,
            intermediate_size=work.width * 37 // 7,
            num_hidden_layers=round(work.blocks * 2 / 3),
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 7),
        )
        self.text: nn.Module = Qwen2Model(config)
        for model in (self.vae, self.text):
            model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, height, width), tokens (B, S) -> clean latents (B, C, H, W), prompt embeddings (B, S, E)."""
        return self.vae.encode(images).latent_dist.sample(), self.text(tokens).last_hidden_state


class PublishedStep:
    """One optimizer step on one batch, encoders included.

    Attributes:
        cached: the batch as the encoders left it, latents (B, C, H, W) and prompt embeddings (B, S, E).
        logged: losses of the second pass, one a unit.
    """

    def __init__(self, students: PlainStudents, work: Workload, encoders: Encoders) -> None:
        self.students, self.encoders = students, encoders
        self.optimizer = torch.optim.AdamW(students.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
        self.generator = torch.Generator().manual_seed(0)
        size = (work.micro_batch, 3, work.side * DOWNSCALE, work.side * DOWNSCALE)
        self.images = torch.rand(size, generator=self.generator) * 2 - 1
        self.tokens = torch.randint(VOCABULARY, (work.micro_batch, work.words), generator=self.generator)
        self.cached = encoders(self.images, self.tokens)
        self.logged: list[Tensor] = []

    def online(self) -> None:
        """The step as published."""
        self._train(*self.encoders(self.images, self.tokens))

    def from_cache(self) -> None:
        """The step on latents and prompt embeddings that are there already."""
        self._train(*self.cached)

    def encode(self) -> None:
        """The encoders alone."""
        self.encoders(self.images, self.tokens)

    def _train(self, clean: Tensor, embeds: Tensor) -> None:
        sigmas = torch.rand(len(clean), generator=self.generator)
        noise = torch.randn(clean.shape, generator=self.generator)
        reading = self.students.read(Latents(torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1)), embeds, sigmas))
        places = range(len(self.students.units))
        for place in places:
            self.students.loss(reading, place).backward()
        with torch.no_grad():  # whether theirs builds a graph here is not said; this is the cheaper way
            self.logged = [self.students.loss(reading, place) for place in places]
        self.optimizer.step()
        self.optimizer.zero_grad()


def take_turns(recipe: str, work: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of our step, theirs with encoders, theirs without, and of the encoders alone; a rank's task."""
    from ppcl_ds import launch

    launch.join()
    load = Workload(**work)
    engine = EngineStep(Path(recipe))
    students = PlainStudents(engine.trainer.teacher.files.folder, engine.spans)
    teacher = _size(students.teacher)
    encoders = Encoders(load, teacher)
    theirs = PublishedStep(students, load, encoders)
    seconds = time_in_turns([engine, theirs.online, theirs.from_cache, theirs.encode], repeats)
    launch.leave()
    return {"seconds": seconds, "text": _size(encoders.text) / teacher, "vae": _size(encoders.vae) / teacher}


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Compare samples per second of the published step and of ours."""
    small = Workload(blocks=12, width=256, micro_batch=4, micro_batches=1)
    work = small if quick else Workload(blocks=12, width=512, micro_batch=8, micro_batches=1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder), work, {"smaller": SPANS})
        task = "benchmarks.published:take_turns"
        [found] = run_ranks(task, 1, recipe=str(recipe), work=asdict(work), repeats=3 if quick else 9)
    ours, online, cached, encoding = found["seconds"]
    note = f"{work}; {len(SPANS)} units; {THREADS} thread; ours reads shards encoded beforehand"
    encoders = (
        f"{note}; text encoder {found['text']:.2f} and VAE {found['vae']:.3f} of the teacher's parameters "
        f"(Qwen-Image's: 0.35 and 0.006), {median(encoding) / median(online):.0%} of the published step's time"
    )
    speeds = [[work.micro_batch / each for each in side] for side in (ours, online, cached)]
    rows = [
        row_of_pairs("ours / published, encoders in its step", speeds[0], speeds[1], "samples/s", encoders),
        row_of_pairs("ours / published, its encoders cached", speeds[0], speeds[2], "samples/s", note),
    ]
    show("Training speed against the published step", rows, json)


if __name__ == "__main__":
    typer.run(main)
