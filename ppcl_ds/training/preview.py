"""A look at models while they train: the same held-out samples, prompts and noise every time, shared over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ppcl_ds import launch, launcher
from ppcl_ds.data.batch import Batch
from ppcl_ds.data.stream import has_images, read_texts
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.branches import level_name, squared_errors
from ppcl_ds.teacher.comparison import FIGURES, Comparison, Piece
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.encoding import Decoder
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.teacher import Teacher, forward
from ppcl_ds.training.delivery import send

_IMAGES = 8
"""Held-out samples, and images of each model; one, where captions cannot be read together."""

_SIDE = 512
"""Most pixels of an image's longer side; larger ones are sent and shown smaller."""

_STEPS = 10
"""Most sampling steps of an image: enough to see what has gone wrong. `ppcl evaluate` takes the recipe's."""


@dataclass(frozen=True)
class Turn:
    """Who of several shares looks at what.

    Attributes:
        number: of the share that this rank has.
        of: how many there are.
        speaks: whether this rank's images count; of those that have the same share, one's do.
    """

    number: int
    of: int
    speaks: bool = True

    @classmethod
    def of_rank(cls) -> Turn:
        """A share for every rank."""
        return cls(dist.get_rank(), dist.get_world_size())


class Preview:
    """What every model is looked at with; every rank makes one.

    Args:
        together: most images that are drawn at once; a micro-batch, so that drawing takes no more memory than training.
        group: all ranks, over gloo.

    Attributes:
        samples: the first held-out ones as they are stored.
        noiser: adds noise to them.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        device: torch.device,
        together: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.together, self.group = together, group
        self.count = _IMAGES if read_texts(recipe.data).joining.padded else 1
        stream = NoisyStream(
            recipe, teacher.call, "heldout", self.count, captions=not has_images(recipe.data, "heldout")
        )
        [(_, clean)] = islice(stream.clean.take(0, 1), 1)
        self.stream, self.noiser, self.samples = stream, stream.noiser, clean.samples
        self.has_images = bool(clean.latents.numel())
        """Whether the samples are more than captions."""
        self.recipe, self.teacher, self.device = recipe, teacher, device

    def noisy(self, sharded: Any, turn: Turn, place: Tensor | None = None) -> Iterator[tuple[bool, NoisyBatch]]:
        """This rank's samples as the teacher reads them in training, one by one on the device, and whether each counts.

        All ranks get equally many. Of captions alone, all read the same micro-batch.

        Args:
            sharded: the teacher, which draws samples where there are captions alone.
            place: on the ladder, (); drawn if not given. Each sample has its own noise, whoever reads it.
        """
        if not self.has_images:
            yield True, self._of_trajectories(sharded)
            return
        for number in range(turn.number, -(-len(self.samples) // turn.of) * turn.of, turn.of):
            own = Batch((self.samples[number % len(self.samples)],))
            if place is None:
                batch = self.stream.with_noise(number, own)
            else:
                seeded = torch.Generator().manual_seed(self.recipe.seed + number)  # training's is another one
                batch = self.noiser.noisy(own, place.expand(1), seeded)
            yield number < len(self.samples), send(batch, self.device)

    def _of_trajectories(self, sharded: Any) -> NoisyBatch:
        return next(read_samples(self.recipe, self.teacher, sharded, "heldout", self.count, 0, 1, self.device))[1]

    def draw(self, answer: Callable[[Arguments], Tensor], turn: Turn) -> Tensor | None:
        """Images (N, C, H, W) in [-1, 1] on rank 0's CPU, None on others; all ranks must call this together.

        Each draws and decodes its own, and sends them to rank 0, in 8 bits and no larger than they are shown. None
        everywhere for a pipeline of two transformers: only one of them is here.

        Args:
            answer: what a model puts out for arguments on the device.
        """
        if len(self.teacher.call.transformers()) > 1:
            return None

        def asked(arguments: Arguments) -> Tensor:
            return answer(send(arguments, self.device)).cpu()

        steps = min(_STEPS, self.recipe.evaluate.steps)
        call, component = self.teacher.call, self.teacher.component
        drawn = []
        for counts, drawing in Drawing.shared(
            self.recipe, call, self.noiser, self.samples, self.together, turn.number, turn.of, steps=steps
        ):
            images = drawing.draw({component: asked}, self.decoder if counts and turn.speaks else None)[1]
            drawn += [] if images is None else [shown(images)]
        everybodys = on_first_rank(drawn, self.group)
        return None if everybodys is None else everybodys.float() / 127.5 - 1

    def pieces(self, sharded: Any, turn: Turn) -> list[Piece]:
        """This rank's share of what else models are compared on; nothing, and a line, where that cannot be had.

        Args:
            sharded: the teacher, which draws samples where there are captions alone.
        """
        micro_batch = 1 if self.has_images else self.count
        try:
            comparison = Comparison(
                self.recipe,
                self.teacher,
                partial(forward, sharded),
                self.device,
                turn.number,
                turn.of,
                micro_batch=micro_batch,
                first=0,
                batches=len(self.samples) // micro_batch,
                prompts=self.samples,
                number=0,
            )
        except UserError as fault:
            launcher.say_once(f"held-out figures with guidance and of few-step draws are left out: {fault}")
            return []
        return list(comparison)

    @cached_property
    def decoder(self) -> Decoder:
        """From latents to images; it takes memory from when this rank first draws."""
        return Decoder(self.teacher.path, self.device)


def shown(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as they are shown, uint8."""
    shrink = min(1.0, _SIDE / max(images.shape[2:]))
    small = images if shrink == 1 else F.interpolate(images, scale_factor=shrink, mode="area")
    return (small.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def on_first_rank(own: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor | None:
    """Everybody's images (N, C, H, W), uint8, on rank 0 in the order of ranks; None on others. All ranks must call it.

    Who has none sends its shape alone.

    Args:
        group: all ranks, over gloo.
    """
    mine = torch.cat(list(own)).contiguous() if own else torch.empty(0, 0, 0, 0, dtype=torch.uint8)
    shape, first = torch.tensor(mine.shape), dist.get_rank() == 0
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.gather(shape, shapes if first else None, group=group)
    if not first:
        if len(mine):
            dist.send(mine, 0, group=group)
        return None
    parts = [mine] if len(mine) else []
    for rank, other in enumerate(shapes[1:], start=1):
        if other[0]:
            parts.append(torch.empty(other.tolist(), dtype=torch.uint8))
            dist.recv(parts[-1], rank, group=group)
    return torch.cat(parts)


class Means:
    """Means over all ranks of what each finds of its own samples."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}

    def add(self, name: str, counts: bool, error: Tensor) -> None:
        """One sample's figure, ()."""
        self._found.setdefault(name, []).extend([error] if counts else [])

    def add_errors(self, suffix: str, piece: Piece, said: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> None:
        """A model's errors on a piece: `heldout/FIGURE{suffix}`, and by noise level `heldout/FIGURE{suffix}/LEVEL`.

        Args:
            said, true: what the model and the teacher make of it.
        """
        for measure, own in said.items():
            name = f"heldout/{FIGURES[measure]}{suffix}"
            for row, error in enumerate(squared_errors(own, true[measure])):
                self.add(name, piece.counts, error)
                if piece.levels is not None:
                    self.add(f"{name}/{level_name(int(piece.levels[row]))}", piece.counts, error)

    def take(self) -> dict[str, float]:
        """Name -> mean over everybody's samples; all ranks must call it."""
        own = {name: (float(sum(errors)), len(errors)) for name, errors in self._found.items()}
        sums: dict[str, tuple[float, int]] = {}
        for each in launch.all_gather(own):
            for name, (total, count) in each.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + total, before[1] + count
        return {name: total / count for name, (total, count) in sums.items() if count}
