"""The section `cluster` of a recipe: the Slurm jobs of `ppcl submit`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ppcl_ds.shipped import shipped
from ppcl_ds.strict import Section


class Cluster(Section):
    """The Slurm jobs of `ppcl submit`. See `docs/cluster.md`."""

    processes_per_node: int = Field(default=8, gt=0)
    """Processes of a full node, one for each accelerator; how many nodes there are follows from the topology."""
    gpus: bool = True
    """Ask for a GPU a process (`--gpus-per-node`); false: nodes have none, or `options` asks in another way."""
    accelerator: str = ""
    """One of those that `ppcl estimate` knows: a run that does not fit on it is refused. Empty: nobody knows."""
    time: str = "24:00:00"
    """Time limit of each job. Training is requeued when it is over, and goes on."""
    notice: int = Field(default=300, gt=0)
    """Seconds before the limit at which training is told: longer than its slowest step and a checkpoint take."""
    requeues: int = Field(default=20, ge=0)
    """How often a job may be requeued: with time limits, the longest that a training may take."""
    encode_tasks: int = Field(default=8, gt=0)
    """Jobs that share the shards to encode."""
    probe_parts: int | None = Field(default=None, gt=0)
    """Jobs that share the probe's batches, each on all processes of the topology; each writes a file as large as the
    sums of all blocks. Default: one an hour of probing, as `ppcl estimate` counts it."""
    options: tuple[str, ...] = ()
    """More options of sbatch for every job, such as `--partition=gpu`; they override those above."""
    scripts: Path = shipped("slurm")
    """Folder of the scripts and of `site.env`; name your own copy here once you edit them."""
