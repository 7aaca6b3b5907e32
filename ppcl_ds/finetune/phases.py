"""What a step of fine-tuning costs: the account of `trainer.py`, changed whenever that changes; for `ppcl estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcl_ds.sections import Finetune
from ppcl_ds.training.phases import Account, LayerCosts, Phase
from ppcl_ds.training.traffic import Cluster, exchanged, most, passed_on


@dataclass(frozen=True)
class FineTuning(Account):
    """The layers are the variant's blocks, each of which reads the streams that enter it.

    - Teacher forward: all forwards of a step come first, so what the stage will read of all micro-batches piles up.
    - Pipeline: 1F1B holds the activations of as many micro-batches as there are stages from this one on; with
      checkpointing what enters each block, and beside it all activations of one block. A stage waits while the others
      compute their first and last micro-batch.

    Attributes:
        rest: parameters that belong to no block; every stage has them.
        trained_rest: those of them that are trained.
        inputs: bytes of latents, prompts and noise levels of a micro-batch, which every stage reads.
        velocities: bytes of those that the last stage is judged by, of one micro-batch.
    """

    section = "finetune"
    what = "the variant's {} blocks"

    settings: Finetune
    rest: int
    trained_rest: int
    inputs: int
    velocities: int

    @property
    def parameters(self) -> int:
        return super().parameters + self.rest

    def phases(self, cluster: Cluster) -> list[list[Phase]]:
        spread = self.cut(cluster.stages)
        return [self._stage(stage, spread, cluster) for stage in range(cluster.stages)]

    def _stage(self, stage: int, spread: Sequence[Sequence[LayerCosts]], cluster: Cluster) -> list[Phase]:
        blocks, ranks, rounds = spread[stage], cluster.ranks_of(stage), self.rounds(cluster)
        settings, checkpointing = self.settings, self.settings.activation_checkpointing
        count = rounds * cluster.stages  # micro-batches of a pipeline in a step
        messages = [self.inputs + sum(map(_targets, own)) for own in spread]
        messages[-1] += self.velocities
        edges = [_entering(own[0]) for own in spread[1:]]
        waiting = {"inputs and targets": count * messages[stage]}
        parameters = sum(block.parameters for block in blocks) + self.rest
        trained = sum(block.trained for block in blocks) + self.trained_rest
        kept = sum(_entering(block) if checkpointing else block.activations for block in blocks)
        passes = [settings.micro_batch * self.training_flops(own) for own in spread]  # of one micro-batch
        others = sum(passes) - passes[stage]
        return [
            self.teacher_forward(cluster, ranks, {"boundaries": sum(map(_targets, self.layers))} | waiting),
            Phase(
                "exchange",
                moved=most(exchanged(rank, messages, cluster) for rank in ranks).times(rounds),
            ),
            Phase(
                "pipeline",
                flops=count * passes[stage],
                moved=most(passed_on(rank, edges, cluster) for rank in ranks).times(count),
                resident={"blocks": parameters * self.teacher.element, "gradients": trained * 4},
                transient={
                    "activations in flight": min(count, cluster.stages - stage) * kept,
                    "one block": max(block.activations for block in blocks) if checkpointing else 0,
                    **waiting,
                },
                waits=others / (count * passes[stage] + others),
            ),
            self.update(cluster, ranks, trained, self.trained_rest, moments=3 if settings.ema else 2),
            *self.looks(cluster),
        ]


def _entering(block: LayerCosts) -> int:
    """Bytes of the streams that enter a block, of one micro-batch."""
    return sum(stream.nbytes for stream in block.batch.inputs.values())


def _targets(block: LayerCosts) -> int:
    """Bytes of the teacher's streams that a block is judged by, of one micro-batch."""
    return sum(stream.nbytes for stream in block.batch.targets.values())
