"""A scheduler's noise levels: how it mixes noise in, and what it expects a model to put out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ppcl_ds.errors import UserError

_NOISE = 0.9
"""Least share of noise at the noisiest level, and of data at the last."""


class Ladder:
    """The noise levels of a pipeline's scheduler for one size, from the noisiest down.

    Args:
        scheduler: set to them.

    Raises:
        UserError: what a model should put out cannot be told from what the scheduler makes of it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.times: Tensor = scheduler.timesteps
        self._swapped = False
        pure = [float(self.noisy(torch.zeros(1, 1), torch.ones(1, 1), rung)) for rung in (0, len(self) - 1)]
        self._swapped = pure[0] < pure[1]  # Mochi counts noise from 0 to 1
        shares = [self._share(rung) for rung in (0, len(self) - 1)]
        if shares[0] < _NOISE or shares[1] > 1 - _NOISE:
            name = type(scheduler).__name__
            raise UserError(
                f"{name} goes from {shares[0]:.0%} noise to {shares[1]:.0%}, so its levels mean something else"
            )
        self._rule = self._learned()

    def __len__(self) -> int:
        return len(self.times)

    def _share(self, rung: int) -> float:
        """Of noise in latents, in the square."""
        signal, level = self._mixed(rung)
        return level**2 / (signal**2 + level**2)

    def _mixed(self, rung: int) -> tuple[float, float]:
        """How much of the data and how much noise is in latents of a rung."""
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        return float(self.noisy(one, zero, rung)), float(self.noisy(zero, one, rung))

    def noisy(self, clean: Tensor, noise: Tensor, rung: int) -> Tensor:
        """Clean latents (B, ...) with noise of a rung, by the scheduler's own rule."""
        scheduler = self._at(rung)
        time = self.times[rung : rung + 1].expand(len(clean))
        if self._swapped:
            clean, noise = noise, clean
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(clean, time, noise)
        if not hasattr(scheduler, "add_noise"):
            raise UserError(
                f"{type(scheduler).__name__} has no rule for adding noise, so its levels mean something else"
            )
        # Where steps are counted from one, the first stands behind the table.
        return scheduler.add_noise(clean, noise, time.clamp(max=scheduler.config.num_train_timesteps - 1))

    def target(self, clean: Tensor, noise: Tensor, rung: int) -> Tensor:
        """What a perfect model would put out for `noisy(clean, noise, rung)`, as the scheduler steps by it."""
        return self._rules(clean, noise, rung)[self._rule]

    def step(self, latents: Tensor, output: Tensor, rung: int, to: int) -> Tensor:
        """Latents (B, ...) of a rung taken to a later one in one deterministic step: Euler's of a flow, DDIM of others.

        These are one formula, and the first order of every DPM solver: what the output says of data and noise is mixed
        as on the later rung. Nothing is kept from step to step.

        Args:
            output: (B, ...), as the scheduler steps by it.
            to: the number of rungs: the end, where no noise is left.
        """
        signal, level = self._mixed(rung)
        if self._rule == "noise":
            noise, clean = output, (latents - level * output) / signal
        elif self._rule == "v":
            square = signal**2 + level**2
            clean = (signal * latents - level * output) / square
            noise = (level * latents + signal * output) / square
        else:
            flow = output if self._rule == "flow" else -output
            clean = (latents - level * flow) / (signal + level)
            noise = clean + flow
        signal, level = self._mixed(to) if to < len(self) else (1.0, 0.0)
        return signal * clean + level * noise

    def _rules(self, clean: Tensor, noise: Tensor, rung: int) -> dict[str, Tensor]:
        signal, level = self._mixed(rung)
        return {"flow": noise - clean, "data": clean - noise, "noise": noise, "v": signal * noise - level * clean}

    def _learned(self) -> str:
        """The rule that the scheduler's configuration names, or else whose step from one rung lands on the next."""
        named = {"epsilon": "noise", "v_prediction": "v"}.get(self.scheduler.config.get("prediction_type", ""))
        if named and not self.scheduler.config.get("use_flow_sigmas"):
            return named
        generator = torch.Generator().manual_seed(0)
        clean, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
        rung = len(self) // 2
        wanted, errors = self.noisy(clean, noise, rung + 1), {}
        for rule, output in self._rules(clean, noise, rung).items():
            scheduler = self._at(rung)
            landed = scheduler.step(output, self.times[rung], self.noisy(clean, noise, rung), return_dict=False)[0]
            errors[rule] = float((landed - wanted).square().mean())
        return min(errors, key=lambda rule: errors[rule])

    def _at(self, rung: int) -> Any:
        """The scheduler as it is before a step from a rung, which it would look up by its time, where two are alike."""
        scheduler = copy.copy(self.scheduler)
        for name in ("_step_index", "_begin_index"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, None)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(rung)
        return scheduler
