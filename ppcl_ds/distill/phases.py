"""What a step of distilling costs: the account of `trainer.py`, changed whenever that changes; for `ppcl estimate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.sections import Distill
from ppcl_ds.training.phases import Account, LayerCosts, Phase
from ppcl_ds.training.traffic import Cluster, exchanged, most, sent_in_turn


@dataclass(frozen=True)
class Distilling(Account):
    """The layers are the units of the plan.

    - Teacher forward: what was recorded for the units of all stages is there, too.
    - Exchange (more than one stage): that; the message to other stages; and what arrives from them, from one after the
      other. Most of it arrives while the units train on the first micro-batches.
    - Unit training: what the stage's units read, of every micro-batch of the round, with the message that may still be
      under way; and the activations of one unit, as each unit's backward follows its forward. Units and the float32
      sums of their gradients are whole on each replica.
    - Replay: what has arrived of the last readings stays, on the accelerator or in pinned CPU memory, and nothing is
      under way while units train but copies from there. Teacher forward and exchange are shared by several steps.
    - Look: a variant's units that other stages train are borrowed.

    Attributes:
        variants: names of the units of each.
    """

    section = "distill"
    what = "the plan's {} units"

    settings: Distill
    variants: Sequence[Sequence[str]] = ()

    @property
    def uses(self) -> int:
        return self.settings.replay.uses

    def phases(self, cluster: Cluster) -> list[list[Phase]]:
        spread = self.cut(cluster.stages)
        messages, recorded = [message(units) for units in spread], held(self.layers)
        return [self._stage(stage, units, messages, recorded, cluster) for stage, units in enumerate(spread)]

    def _stage(
        self, stage: int, units: Sequence[LayerCosts], messages: Sequence[int], recorded: int, cluster: Cluster
    ) -> list[Phase]:
        ranks, rounds, replay = cluster.ranks_of(stage), self.rounds(cluster), self.settings.replay
        parameters = sum(unit.parameters for unit in units)
        boundaries = {"boundaries for units": recorded}
        outgoing, incoming = sum(messages) - messages[stage], (cluster.stages - 1) * messages[stage]
        under_way = {"outgoing": outgoing, "incoming": incoming}
        training = {"batches": held(units) + incoming, "outgoing": outgoing}
        ring = {"replay": replay.ring * rounds * (held(units) + incoming)}
        if replay.uses > 1:
            training = {"batches": 2 * messages[stage] if replay.offload else 0}
        return [
            self.teacher_forward(cluster, ranks, boundaries),
            Phase(
                "exchange",
                moved=most(exchanged(rank, messages, cluster) for rank in ranks).times(rounds / replay.uses),
                in_turn=most(sent_in_turn(rank, messages, cluster) for rank in ranks).times(
                    rounds * (replay.uses == 1)
                ),
                transient=boundaries | under_way if cluster.stages > 1 else {},
                beside_next=True,
            ),
            Phase(
                "unit training",
                flops=rounds * cluster.stages * self.settings.micro_batch * self.training_flops(units),
                resident={"units": parameters * self.teacher.element, "gradients": parameters * 4}
                | (ring if replay.uses > 1 and not replay.offload else {}),
                transient=training | {"activations": max(unit.activations for unit in units)},
                host=ring if replay.uses > 1 and replay.offload else {},
            ),
            self.update(cluster, ranks, parameters),
            *self.looks(cluster, self._borrowed(units)),
        ]

    def _borrowed(self, own: Sequence[LayerCosts]) -> int:
        """Bytes of the units that a stage does not have, of the variant that has most of them."""
        others = {layer.name: layer.parameters for layer in self.layers if layer not in own}
        return self.teacher.element * max((sum(others.get(n, 0) for n in each) for each in self.variants), default=0)


def message(units: Iterable[LayerCosts]) -> int:
    """Bytes that the exchange sends for these units from one micro-batch: each tensor once."""
    tensors = {id(tensor): tensor for tensor in _tensors(units)}
    return sum(tensor.nbytes for tensor in tensors.values())


def held(units: Iterable[LayerCosts]) -> int:
    """Bytes of memory behind what these units read from one micro-batch: each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(units)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(units: Iterable[LayerCosts]) -> list[Tensor]:
    leaves = pytree.tree_leaves([vars(unit.batch) for unit in units])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
