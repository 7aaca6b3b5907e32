"""Micro-batches of the teacher's own trajectories, from captions alone: how they begin and advance.

Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Sample
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sampling import Trajectories
from ppcl_ds.teacher.batch_call import Asked
from ppcl_ds.teacher.guidance import Guide
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream, draw_places
from ppcl_ds.teacher.pipeline_call import PipelineCall

_TRAJECTORY, _UNPROMPTED, _BUCKET, _REAL = range(1, 5)
"""What a random number is for; beside the seed, so that none is drawn twice."""


@dataclass(frozen=True)
class Trajectory:
    """A trajectory on its way.

    Attributes:
        number: among those of its pool; all but `place` and `latents` follow from it.
        place: steps that it has gone.
        rungs: its schedule: a rung for each step.
        scale: of its guidance.
        latents: (1, ...) float32 on the CPU.
    """

    number: int
    place: int
    sample: Sample
    rungs: tuple[int, ...]
    scale: float
    latents: Tensor


Pool = tuple[Trajectory, ...]


@dataclass(frozen=True)
class Finished:
    """A trajectory that has been drawn.

    Attributes:
        key: no other one has it; what stands behind its last `-` is the shape of its latents, as the VAE lays them out.
    """

    key: str
    sample: Sample
    latents: Tensor


class TrajectoryStream:
    """Endless numbered micro-batches like those of `NoisyStream`; what the teacher says of each is told to `advance`.

    Micro-batch j belongs to lane j mod `lanes`. A lane has a pool of trajectories for every bucket of captions, as many
    as a micro-batch holds. Which bucket a micro-batch is of, captions, noise, schedules and guidance are drawn by seed,
    lane and number alone. So ranks of any number that divides the lanes see the same samples, as long as each goes
    through its lanes in order and tells what the teacher has said before it asks for the lane's next micro-batch.
    Trajectories begin at noise. Those that a pool begins with have fewer steps the earlier they stand in it, so that it
    is soon at staggered places.

    Args:
        call: the teacher's pipeline.
        lanes: micro-batches in an optimizer step.
        kept: so many micro-batches of a lane back, a state can still be asked for.
        keep: so many of the finished ones, over all lanes, are kept; about, where there are several buckets.

    Attributes:
        clean: captions, and images, if there are some.
        dropped: trajectories that were not finite, on this rank.
        finished: trajectories that have been drawn, as many as are kept; whoever takes them empties it.

    Raises:
        UserError: the pipeline cannot be guided, or asks this transformer only later than at noise.
    """

    def __init__(
        self,
        recipe: Recipe,
        call: PipelineCall,
        split: Literal["train", "heldout"],
        micro_batch: int,
        lanes: int,
        settings: Trajectories,
        kept: int = 1,
        keep: int = 0,
    ) -> None:
        self.settings = settings
        self.recipe, self.call, self.split, self.noise = recipe, call, split, recipe.noise
        self.seed, self.micro_batch, self.lanes = recipe.seed, micro_batch, lanes
        self.kept = kept
        captions = NoisyStream(recipe, call, split, 1, lanes, captions=True)
        self.clean, self.noiser = captions.clean, captions.noiser
        self.guides = self.settings.guidance[1] > 1
        if self.guides and call.embeds_guidance:
            raise UserError(
                "trajectories.guidance: the transformer takes the scale as a number; set [1, 1], and the scale in "
                "teacher.options"
            )
        if self.guides and self.noiser.texts.guiding is None:
            raise UserError(
                f"trajectories.guidance: what {type(call.pipe).__name__} reads with guidance cannot be made of "
                "stored prompts; set [1, 1]"
            )
        self.guide = Guide(call)
        self.pools: dict[tuple[int, int], Pool] = {}
        """Lane and bucket -> its trajectories."""
        self.before: dict[int, deque[tuple[int, dict[int, Pool]]]] = {}
        """Lane -> its newest micro-batches with the pools that it had before each."""
        self.dropped = 0
        self.keep = keep
        self.finished: list[Finished] = []
        self.known: set[str] = set()
        """Keys of trajectories that were kept before this process began."""
        if recipe.data.real_share:
            _ = self.images

    @cached_property
    def images(self) -> NoisyStream:
        """Of `data.real_share`."""
        return NoisyStream(self.recipe, self.call, self.split, self.micro_batch, self.lanes)

    def take(self, start: int, stride: int) -> Iterator[tuple[int, NoisyBatch]]:
        """Micro-batches start, start + stride, ... with their numbers, each made when it is asked for."""
        for number in count(start, stride):
            lane = number % self.lanes
            own = {bucket: pool for (of, bucket), pool in self.pools.items() if of == lane}
            self.before.setdefault(lane, deque(maxlen=self.kept + 1)).append((number, own))
            if self._random(_REAL, number).random_sample() < self.recipe.data.real_share:
                yield number, self.images.with_noise(number, self.images.clean.batch(number))
            else:
                yield number, self._batch(number, self._pool(lane, self._bucket(number)))

    def _random(self, *what: int) -> np.random.RandomState:
        # RandomState: numpy will never change what it draws, and a run is resumed by drawing it again.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, *what])))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where the buckets end, laid end to end."""
        return np.bincount(self.clean.decoder.buckets).cumsum()

    def _bucket(self, number: int) -> int:
        place = self._random(_BUCKET, number).random_sample() * self._ends[-1]
        return int(np.searchsorted(self._ends, place, "right"))

    def _pool(self, lane: int, bucket: int) -> Pool:
        if (lane, bucket) not in self.pools:
            self.pools[lane, bucket] = tuple(self._begun(lane, bucket, number) for number in range(self.micro_batch))
        return self.pools[lane, bucket]

    def _begun(self, lane: int, bucket: int, number: int) -> Trajectory:
        """A trajectory at its beginning."""
        sample = self.clean.sample(bucket, number * self.lanes + lane)
        random = self._random(_TRAJECTORY, lane, bucket, number)
        fewest, most = self.settings.steps
        steps = int(random.randint(fewest, most + 1))
        if number < self.micro_batch:
            steps = 1 + steps * number // self.micro_batch
        scale = float(random.uniform(*self.settings.guidance)) if self.guides else 1.0
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        if not self.guides and random.random_sample() < self.noise.caption_dropout:
            sample = replace(sample, prompt=self.noiser.empty(sample), caption="")
        own = self.call.own_rungs(sample.size)
        if own[0]:
            raise UserError(
                f"{self.call.folder}: {self.call.component} is not asked at noise, where trajectories begin"
            )
        places = draw_places(self.noise, steps - 1, generator) if steps > 1 else torch.empty(0)
        rungs = sorted({0, *(own[int(place * len(own))] for place in places)})
        layout = self.call.to_vae(sample.size)
        noise = torch.randn(1, *layout.shape, generator=generator)
        latents = layout.put_back(noise, self.call.latents_shape(sample.size)[1:])
        return Trajectory(number, 0, sample, tuple(rungs), scale, latents)

    def _batch(self, number: int, pool: Pool) -> NoisyBatch:
        size, dtype = pool[0].sample.size, self.noiser.dtype
        own, other = [], []
        for trajectory, unprompted in zip(pool, self._unprompted(number), strict=True):
            prompts = [trajectory.sample.prompt, self.noiser.empty(trajectory.sample)]
            first, second = (prompt.to(dtype) for prompt in (reversed(prompts) if unprompted else prompts))
            asked = Asked(trajectory.latents.to(dtype), trajectory.rungs[trajectory.place], first)
            own.append(asked)
            other.append(replace(asked, prompt=second))
        ask = self.noiser.batches.arguments
        rungs = self.call.own_rungs(size)
        places = torch.tensor([rungs.index(asked.rung) / len(rungs) for asked in own])
        others = ask(other, size) if self.guides else None
        return NoisyBatch(ask(own, size), torch.empty(0), size, number, others, places)

    def _unprompted(self, number: int) -> list[bool]:
        """Which samples of a micro-batch units see without their prompt, where the teacher reads both."""
        drawn = self._random(_UNPROMPTED, number).random_sample(self.micro_batch)
        return [self.guides and bool(place < self.noise.caption_dropout) for place in drawn]

    def advance(self, number: int, own: Tensor, other: Tensor | None) -> None:
        """Take the trajectories of a micro-batch one step further; others begin in place of those that are finished.

        Args:
            own, other: what the transformer put out for `arguments` and `other` of the micro-batch, (B, ...).
        """
        lane, bucket = number % self.lanes, self._bucket(number)
        pool = self._pool(lane, bucket)
        size, newest = pool[0].sample.size, max(trajectory.number for trajectory in pool)
        said = own.float().cpu().split(1)
        others = said if other is None else other.float().cpu().split(1)
        moved = []
        for trajectory, one, two, unprompted in zip(pool, said, others, self._unprompted(number), strict=True):
            prompted, without = (two, one) if unprompted else (one, two)
            output = self.call.stepped_by(prompted, size)
            if trajectory.scale > 1:
                output = self._guided(trajectory, prompted, without)
            latents = self._stepped(trajectory, output)
            place = trajectory.place + 1
            finite = bool(latents.isfinite().all())
            self.dropped += not finite
            if finite and place < len(trajectory.rungs):
                moved.append(replace(trajectory, place=place, latents=latents))
            else:
                if finite and self._wanted(bucket, trajectory):
                    shape = "x".join(map(str, self.call.to_vae(size).shape))
                    key = f"{lane:06d}_{bucket}_{trajectory.number:06d}-{shape}"
                    if key not in self.known:
                        self.finished.append(Finished(key, trajectory.sample, latents))
                newest += 1
                moved.append(self._begun(lane, bucket, newest))
        self.pools[lane, bucket] = tuple(moved)

    def _wanted(self, bucket: int, trajectory: Trajectory) -> bool:
        """Whether a finished trajectory is kept: the first ones of each pool, but for those in too few steps."""
        count, before = (int(self._ends[n]) if n >= 0 else 0 for n in (bucket, bucket - 1))
        own = self.keep * (count - before) / int(self._ends[-1]) / self.lanes
        return bool(trajectory.sample.caption) and 0 <= trajectory.number - self.micro_batch < own

    def _guided(self, trajectory: Trajectory, prompted: Tensor, without: Tensor) -> Tensor:
        prompt, empty, guiding = (
            trajectory.sample.prompt,
            self.noiser.empty(trajectory.sample),
            self.noiser.texts.guiding,
        )
        assert guiding is not None
        both: Prompt = replace(prompt, text=guiding(tuple(prompt.text), tuple(empty.text)))
        rung, size = trajectory.rungs[trajectory.place], trajectory.sample.size
        return self.guide(prompted, without, trajectory.latents, rung, both, size, trajectory.scale)

    def _stepped(self, trajectory: Trajectory, output: Tensor) -> Tensor:
        ladder, place = self.call.ladder(trajectory.sample.size), trajectory.place
        last = place + 1 == len(trajectory.rungs)
        return ladder.step(
            trajectory.latents, output, trajectory.rungs[place], len(ladder) if last else trajectory.rungs[place + 1]
        )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is read inside leaves no trace."""
        pools, before = dict(self.pools), {lane: seen.copy() for lane, seen in self.before.items()}
        finished = list(self.finished)
        yield
        self.pools, self.before, self.finished = pools, before, finished

    def state(self, number: int) -> dict[str, Tensor]:
        """All that is needed to go on from micro-batch `number` on, of this rank's lanes: name -> float32 tensor.

        Args:
            number: the first one of a step's micro-batches; one of the newest `kept` of a lane.
        """
        found: dict[str, Tensor] = {}
        for lane, seen in self.before.items():
            later = [pools for at, pools in seen if at >= number]
            pools = later[0] if later else {b: pool for (of, b), pool in self.pools.items() if of == lane}
            for bucket, pool in pools.items():
                name = f"{lane}/{self.clean.decoder.shapes[bucket]}"
                places = [[trajectory.number, trajectory.place] for trajectory in pool]
                found[f"{name}/places"] = torch.tensor(places, dtype=torch.int32).view(torch.float32)
                found[f"{name}/latents"] = torch.cat([trajectory.latents for trajectory in pool])
        return found

    def load(self, state: Mapping[str, Tensor], rank: int, world: int) -> None:
        """Go on from the state of all lanes, with those that are a rank's."""
        for name in state:
            lane, shape, what = name.split("/")
            if what != "latents" or int(lane) % world != rank:
                continue
            bucket = self.clean.decoder.shapes.index(shape)
            places = state[f"{lane}/{shape}/places"].contiguous().view(torch.int32).tolist()
            self.pools[int(lane), bucket] = tuple(
                replace(self._begun(int(lane), bucket, number), place=place, latents=latents)
                for (number, place), latents in zip(places, state[name].split(1), strict=True)
            )
