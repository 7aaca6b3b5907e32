"""What the recipe and the teacher's DeepSpeed file say about memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass

from ppcl_ds.estimate.layout import Layout
from ppcl_ds.recipe import Recipe, read_deepspeed_file
from ppcl_ds.sections import Training


@dataclass(frozen=True)
class Settings:
    """The settings that matter.

    Attributes:
        ranks_per_copy: ranks that hold a copy of the teacher between them (ZeRO++ hpZ).
        max_live: elements of the teacher gathered at most (`stage3_max_live_parameters`).
        prefetch: elements gathered ahead at most (`stage3_prefetch_bucket_size`).
        persistent: parameters up to this many elements stay whole (`stage3_param_persistence_threshold`).
        offload: whether masters and moments lie in CPU memory.
    """

    ranks_per_copy: int
    max_live: int
    prefetch: int
    persistent: int
    offload: bool

    def secondary(self, layout: Layout) -> bool:
        """Whether there is a second partition, over `ranks_per_copy` ranks, beside the one over all."""
        return 1 < self.ranks_per_copy < layout.world

    def gather_group(self, rank: int, layout: Layout) -> range:
        """The ranks that a rank gathers the teacher's blocks from."""
        return layout.copy_group(rank, self.ranks_per_copy) if self.secondary(layout) else range(layout.world)


def settings_of(recipe: Recipe, training: Training, gpus_per_node: int) -> Settings:
    """Read recipe and the teacher's DeepSpeed file; what that leaves out has DeepSpeed's defaults.

    Raises:
        UserError: the file cannot be read.
    """
    zero = read_deepspeed_file(recipe.deepspeed.teacher).get("zero_optimization", {})
    return Settings(
        ranks_per_copy=recipe.teacher.ranks_per_copy or gpus_per_node,
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        offload=training.optimizer.offload,
    )
