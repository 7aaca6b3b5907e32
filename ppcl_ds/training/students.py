"""What both kinds of training put into DeepSpeed's pipeline: named parts, laid over the stages by cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn


class Students(PipelineModule):
    """Layers over the pipeline stages; each rank builds only its stage's.

    Every rank must construct it.

    Args:
        costs: of each layer, in any unit; the stages get neighbours of about equal cost.
        options: of `PipelineModule`.
    """

    def __init__(self, layers: Sequence[LayerSpec], costs: Sequence[int], stages: int, **options: Any) -> None:
        self.costs = list(costs)
        with redirect_stdout(StringIO()):  # it prints its layout line by line
            super().__init__(list(layers), num_stages=stages, **options)

    def _count_layer_params(self) -> list[int]:
        """The cost of each layer; the stock method would build every layer on every rank to count it."""
        return self.costs

    @property
    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is trained on this stage: name of a part -> its parameters by name. A part is one flat vector to the
        optimizer and to checkpoints."""
        raise NotImplementedError

    @property
    def copies(self) -> frozenset[str]:
        """Parts that another stage also has, and writes into checkpoints."""
        return frozenset()

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """For torch's optimizer: one group a part of this stage, with the part's name.

        Args:
            rate: learning rate.
        """
        return [{"params": list(own.values()), "name": name, "lr": rate} for name, own in self.trained.items()]


class Means:
    """Means of what is measured micro-batch by micro-batch; tensors stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Add scalars of one micro-batch, the same names every time."""
        for name, value in measured.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def drain(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
