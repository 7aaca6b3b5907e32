"""The section `wandb` of a recipe: where trainings are watched beside TensorBoard."""

from __future__ import annotations

from typing import Literal

from ppcl_ds.strict import Section


class Wandb(Section):
    """Weights & Biases: trainings send it whatever they write for TensorBoard.

    Needs `pip install 'ppcl-ds[wandb]'`, and `wandb login` unless it is offline.
    """

    project: str
    entity: str = ""
    """User or team. Default: the account's own."""
    name: str = ""
    """Of the runs, before the command and the variant. Default: that of the run folder."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: it is kept in the training's folder, for `wandb sync`."""
