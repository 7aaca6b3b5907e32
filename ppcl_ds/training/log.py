"""What a run says of itself: means over micro-batches, TensorBoard, the progress line, the table of its units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.units.plan import Plan
from ppcl_ds.watch.mirror import Mirror
from ppcl_ds.watch.tensorboard import TensorBoard, mean_over_ranks

_OUTSIDE = ("checkpoint", "preview")
"""Phases that are no part of a step."""

_LOST = 3
"""A unit that has skipped every step of so many logs in a row ends the run: nothing will bring its gradient back."""


class Means:
    """Means of what is measured micro-batch by micro-batch; tensors stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, measured: Mapping[str, Tensor]) -> None:
        for name, value in measured.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def drain(self) -> dict[str, float]:
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class Log:
    """Every rank makes one and calls it alike; rank 0 writes and speaks.

    Args:
        board: TensorBoard folder.
        done: steps that a checkpoint has brought; what the board holds of later ones is taken back.
        samples: in one optimizer step, over all ranks.
        flops: of one optimizer step, over all ranks.
        matrix_rate: FLOP/s of one matrix product on this rank.
        skipped: `NAME/skipped_steps` of all that is trained so far, as a checkpoint may have brought them.
        total: the loss, from everything that was measured.
        mirror: see `TensorBoard`.
    """

    def __init__(
        self,
        board: Path,
        *,
        done: int,
        samples: int,
        flops: float,
        matrix_rate: float,
        skipped: Mapping[str, float],
        total: Callable[[Mapping[str, float]], float],
        mirror: Callable[[], Mirror] | None = None,
    ) -> None:
        self.board, self.total = TensorBoard(board, done + 1, mirror), total
        self.samples, self.flops, self.matrix_rate = samples, flops, matrix_rate
        self.newest: dict[str, float] = {}
        self.skipped = skipped
        self.barren: Counter[str] = Counter()
        """How many logs in a row have found that a unit skipped every step since the one before."""

    def write(self, step: int, own: Mapping[str, float], seconds: Mapping[str, float], steps: int) -> str:
        """Write what was measured over the last `steps` steps.

        Args:
            own: this rank's values, `unit/loss/output` and so on; where several ranks have one, their mean counts.
            seconds: by phase, over those steps.

        Returns:
            One line for the console.

        Raises:
            UserError: a unit trains no more, see `_LOST`.
        """
        each = {f"seconds/{phase}": value / steps for phase, value in seconds.items() if phase not in _OUTSIDE}
        per_step = sum(each.values())
        rate = self.flops / per_step
        each |= {f"seconds/{phase}": seconds[phase] for phase in _OUTSIDE if phase in seconds}
        values = mean_over_ranks(
            {
                **own,
                **each,
                "run/samples_per_second": self.samples / per_step,
                "run/flops_per_second": rate,
                "run/share_of_peak": rate / dist.get_world_size() / self.matrix_rate,
            }
        )
        values["run/loss"] = self.total(values)
        self.board.scalars(step, values)
        self._name_skipped(step, values, steps)
        self.newest = values
        shares = ", ".join(
            f"{name.removeprefix('seconds/')} {value / per_step:.0%}"
            for name, value in each.items()
            if name.removeprefix("seconds/") not in _OUTSIDE
        )
        memory = max(value for name, value in values.items() if name.startswith("memory_gib/"))
        return (
            f"loss {values['run/loss']:.4f}, {values['run/samples_per_second']:.3g} samples/s, "
            f"{per_step:.3g} s a step ({shares}), {rate / 1e12:.3g} TFLOP/s "
            f"({values['run/share_of_peak']:.0%} of matrix products), {memory:.2f} GiB"
        )

    def _name_skipped(self, step: int, values: Mapping[str, float], steps: int) -> None:
        counts = {name: count for name, count in values.items() if name.endswith("/skipped_steps")}
        for name, count in counts.items():
            new, trained = count - self.skipped.get(name, 0), name.removesuffix("/skipped_steps")
            self.barren[name] = self.barren[name] + 1 if new >= steps else 0
            if self.barren[name] == _LOST:
                raise UserError(
                    f"'{trained}' has skipped every step of {_LOST} logs, {count:.0f} of {step} in all: its gradients "
                    "are not finite; lower the learning rate, or train in fp32. Checkpoints stay as they are"
                )
            if new > 0 and dist.get_rank() == 0:
                print(f"'{trained}': gradients not finite; it has skipped {count:.0f} of {step} steps", flush=True)
        self.skipped = counts


def print_units(plan: Plan, newest: Mapping[str, float]) -> None:
    """A table of the units as they were last written down."""
    if dist.get_rank() or not newest:
        return
    table = Table(title="units")
    table.add_column("unit", overflow="fold")
    for column in ("blocks", "output", "loss", "norm ratio", "gradient", "skipped"):
        table.add_column(column, justify="right")
    for unit in plan.units:
        for output in unit.outputs:
            numbers = (f"loss/{output}", f"norm_ratio/{output}", "gradient_norm", "skipped_steps")
            loss, ratio, gradient, skipped = (newest[f"{unit.name}/{number}"] for number in numbers)
            blocks = f"{unit.span[0]}-{unit.span[1]}"
            cells = (f"{loss:.4f}", f"{ratio:.3f}", f"{gradient:.2g}", f"{skipped:.0f}")
            table.add_row(escape(unit.name), blocks, output, *cells)
    Console().print(table)
