"""What a step of training costs, as each training states it: the shape of the account, and what both have in common.

Every byte is of a tensor. The driver's context, NCCL's buffers, what kernels allocate inside and the gaps between
allocations are not seen. FLOPs are those of matrix products, convolutions and attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from ppcl_ds.sections import Training
from ppcl_ds.training.flops import unit_passes
from ppcl_ds.training.stages import stage_bounds
from ppcl_ds.training.traffic import Cluster, Traffic, most, ring
from ppcl_ds.units.unit import UnitBatch

Parts = dict[str, int]
"""Part of the memory -> bytes."""


@dataclass(frozen=True)
class Phase:
    """A phase of an optimizer step, on a process of one stage.

    Attributes:
        name: such as `teacher forward`.
        flops: that it computes in a step.
        moved: bytes that it moves in a step, by link.
        in_turn: where processes move theirs one after the other, the bytes of all that wait for each other.
        resident: memory that this phase needs and that stays from step to step.
        transient: memory that is there in this phase alone, at its worst.
        host: CPU memory that stays from step to step.
        beside_next: whether it runs beside the phase after it, so that the slower of both counts.
        waits: share of its time in which the process waits for other stages.
    """

    name: str
    flops: float = 0.0
    moved: Traffic = field(default_factory=Traffic)
    in_turn: Traffic = field(default_factory=Traffic)
    resident: Parts = field(default_factory=dict)
    transient: Parts = field(default_factory=dict)
    host: Parts = field(default_factory=dict)
    beside_next: bool = False
    waits: float = 0.0


@dataclass(frozen=True)
class Sharding:
    """How the teacher is laid over the ranks (ZeRO-3), from the recipe and the teacher's DeepSpeed file.

    Attributes:
        ranks_per_copy: ranks that hold a copy of the teacher between them (ZeRO++ hpZ).
        max_live: elements gathered at most (`stage3_max_live_parameters`).
        prefetch: elements gathered ahead at most (`stage3_prefetch_bucket_size`).
        persistent: parameters up to this many elements stay whole (`stage3_param_persistence_threshold`).
        whole: whether every rank holds all of it instead, and nothing is gathered.
        offload: whether partitions lie in CPU memory (`offload_param`).
        pinned: whether that is pinned.
    """

    ranks_per_copy: int
    max_live: int
    prefetch: int
    persistent: int
    whole: bool = False
    offload: bool = False
    pinned: bool = False

    def secondary(self, cluster: Cluster) -> bool:
        """Whether there is a second partition, over `ranks_per_copy` ranks, beside the one over all."""
        return 1 < self.ranks_per_copy < cluster.world

    def gather_group(self, rank: int, cluster: Cluster) -> range:
        """The ranks that a rank gathers the teacher's blocks from."""
        if not self.secondary(cluster):
            return range(cluster.world)
        first = rank // self.ranks_per_copy * self.ranks_per_copy
        return range(first, first + self.ranks_per_copy)


@dataclass(frozen=True)
class TeacherCosts:
    """The frozen teacher, and its forward on one micro-batch up to the last block that is needed.

    Attributes:
        parameters: elements and bytes of an element, for each parameter.
        used: the same, without the blocks that do not run.
        buffers: bytes of its buffers.
        largest_block: elements of the largest block that runs.
        element: bytes of an element in the dtype of the run.
        flops: of one sample's forward.
        activations: most bytes that a block's forward takes, outputs included.
        forwards: for each micro-batch.
        decoder: bytes of the VAE, and of decoding one image.
    """

    parameters: tuple[tuple[int, int], ...]
    used: tuple[tuple[int, int], ...]
    buffers: int
    largest_block: int
    element: int
    flops: float
    activations: int
    sharding: Sharding
    forwards: int = 1
    decoder: int = 0

    def resident(self, cluster: Cluster) -> Parts:
        """The partition over all ranks; the one inside the node, if any; and what every rank has whole. Or all."""
        sharding = self.sharding
        if sharding.whole:
            return {"teacher": sum(partition_sizes(self.parameters, 1)) + self.buffers}
        whole = sum(n * size for n, size in self.parameters if n <= sharding.persistent)
        small = whole if cluster.world > 1 or sharding.offload else 0
        return ({} if sharding.offload else self._partitions(cluster)) | {"teacher small tensors": small + self.buffers}

    def _partitions(self, cluster: Cluster) -> Parts:
        """The partition over all ranks, and the one inside the node, if any."""
        divided = self._divided(cluster).items()
        taken = {name: sum(partition_sizes(self.parameters, ranks)) for name, ranks in divided}
        return {"teacher partition": 0, "teacher copy in the node": 0} | taken

    def host(self, cluster: Cluster) -> Parts:
        """CPU memory of a process, if partitions lie there. What is pinned takes the next power of two of bytes, each
        parameter's part by itself, as torch's allocator of such memory has it."""
        if not self.sharding.offload:
            return {}
        sizes = {
            name: partition_sizes([p for p in self.parameters if p[0] > self.sharding.persistent], ranks)
            for name, ranks in self._divided(cluster).items()
        }
        taken = (lambda size: 1 << (size - 1).bit_length()) if self.sharding.pinned else int
        return {name: sum(map(taken, each)) for name, each in sizes.items()}

    def _divided(self, cluster: Cluster) -> dict[str, int]:
        """Each partition -> the ranks that it is divided over."""
        copy = {"teacher copy in the node": self.sharding.ranks_per_copy} if self.sharding.secondary(cluster) else {}
        return {"teacher partition": cluster.world} | copy

    def gathered(self, cluster: Cluster) -> int:
        """Bytes of parameters that are whole for a moment: those of the largest block, and with them either the buffer
        that they arrived in or what was fetched ahead. That comes in two buffers: one is under way; of the other, part
        is in the block already, and the rest, which is the next block's, keeps it alive."""
        if self.sharding.whole or (cluster.world == 1 and not self.sharding.offload):
            return 0
        behind_it = sum(elements for elements, _ in self.used) - self.largest_block
        ahead = max(0, min(self.sharding.prefetch, self.sharding.max_live - self.largest_block, behind_it))
        return (self.largest_block + max(self.largest_block, min(2 * ahead, behind_it))) * self.element

    def gathers(self, rank: int, cluster: Cluster) -> Traffic:
        """One forward: all parameters that are used, but those that are always whole."""
        if self.sharding.whole:
            return Traffic()
        size = sum(elements * size for elements, size in self.used if elements > self.sharding.persistent)
        return ring(size, rank, self.sharding.gather_group(rank, cluster), cluster)


def partition_sizes(parameters: Iterable[tuple[int, int]], ranks: int) -> list[int]:
    """Bytes of one rank's parts under ZeRO-3: every parameter is cut into equal parts, the last one padded.

    Args:
        parameters: elements and bytes of an element, for each parameter.
    """
    return [-(-elements // ranks) * size for elements, size in parameters]


@dataclass(frozen=True)
class LayerCosts:
    """What is laid over the stages, one of many: a unit of a library, or a block of a variant.

    Attributes:
        name: such as `blocks_03_04`.
        parameters: how many it has.
        trained: how many of them are trained.
        flops: of one sample's forward.
        activations: most bytes that training it on one micro-batch takes, beside parameters, gradients and batch.
        batch: meta tensors of one micro-batch: the streams that enter it, and the teacher's that it is judged by.
        joined: whether it has to be on the stage of the one before.
    """

    name: str
    parameters: int
    trained: int
    flops: float
    activations: int
    batch: UnitBatch
    joined: bool = False


@dataclass(frozen=True)
class Account(ABC):
    """What a training costs on any cluster.

    Attributes:
        teacher: its forward.
        layers: what is laid over the stages, in order.
        settings: the recipe's section.
        section: its name.
        what: the layers in words, with a place for their number.
    """

    section: ClassVar[str]
    what: ClassVar[str]

    teacher: TeacherCosts
    layers: Sequence[LayerCosts]
    settings: Training

    @abstractmethod
    def phases(self, cluster: Cluster) -> list[list[Phase]]:
        """For each stage, the phases of a step on the process that has most of each.

        Raises:
            UserError: there are more stages than can be cut.
        """

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def cut(self, stages: int) -> list[Sequence[LayerCosts]]:
        """The layers of each stage.

        Raises:
            UserError: there are more stages than can be cut.
        """
        joined, costs = [layer.joined for layer in self.layers], [layer.flops for layer in self.layers]
        return [self.layers[a:b] for a, b in pairwise(stage_bounds(joined, costs, stages, self.what))]

    def rounds(self, cluster: Cluster) -> int:
        """Teacher forwards of each process in a step; rounded up where the micro-batches do not fill the cluster."""
        return -(-self.settings.micro_batches_per_step // cluster.world)

    def samples(self, cluster: Cluster) -> int:
        return self.rounds(cluster) * cluster.world * self.settings.micro_batch

    @property
    def uses(self) -> int:
        """Optimizer steps for each reading of the teacher."""
        return 1

    def step_flops(self, cluster: Cluster) -> float:
        """A mean, where not every step reads the teacher."""
        teacher = self.teacher.flops * self.teacher.forwards / self.uses
        return self.samples(cluster) * (teacher + self.training_flops(self.layers))

    def training_flops(self, layers: Iterable[LayerCosts]) -> float:
        """FLOPs of training layers on one sample."""
        return sum(layer.flops for layer in layers) * unit_passes(self.settings.activation_checkpointing)

    def teacher_forward(self, cluster: Cluster, ranks: range, held: Parts) -> Phase:
        """The teacher on each process's own micro-batches: the block at work, gathered parameters, what is recorded.

        Args:
            ranks: of the stage.
            held: what else is there meanwhile.
        """
        rounds = self.rounds(cluster) * self.teacher.forwards / self.uses
        return Phase(
            "teacher forward",
            flops=rounds * self.settings.micro_batch * self.teacher.flops,
            moved=most(self.teacher.gathers(rank, cluster) for rank in ranks).times(rounds),
            resident=self.teacher.resident(cluster),
            host=self.teacher.host(cluster),
            transient={"gathered block": self.teacher.gathered(cluster), "activations": self.teacher.activations}
            | held,
        )

    def looks(self, cluster: Cluster, borrowed: int = 0) -> list[Phase]:
        """A look at held-out data, if there are any: the teacher with nothing recorded, and what draws and decodes.

        Args:
            borrowed: bytes of units of other stages.
        """
        if not self.settings.sample_every:
            return []
        teacher = {"gathered block": self.teacher.gathered(cluster), "activations": self.teacher.activations}
        return [Phase("look", transient=teacher | {"borrowed units": borrowed, "VAE": self.teacher.decoder})]

    def update(self, cluster: Cluster, ranks: range, trained: int, shared: int = 0, moments: int = 2) -> Phase:
        """The end of a step: gradients are averaged over the replicas in float32 (reduce-scatter and all-gather), each
        replica steps its share, and the new parameters are gathered. A float32 master and its moments are divided over
        the replicas.

        Args:
            ranks: of the stage.
            trained: parameters.
            shared: those of them that every stage has, whose gradients are summed over the stages, too.
            moments: float32 numbers that the optimizer keeps of each parameter beside the master.
        """
        size, everywhere = trained * (2 * 4 + self.teacher.element), shared * 2 * 4
        offload, share = self.settings.optimizer.offload, -(-trained // cluster.replicas)
        kept = {"optimizer": share * 4 * (1 + moments)}
        way = {
            "gradients and parameters on their way": share * (4 + self.teacher.element)
        }  # may take twice that, pinned
        copies = {"copies for a checkpoint": share * 4 * (1 + moments)}
        return Phase(
            "gradient reduction",
            moved=most(
                ring(size, rank, ranks, cluster) + ring(everywhere, rank, cluster.pipe_group(rank), cluster)
                for rank in ranks
            ),
            resident={"optimizer": 0} if offload else kept,
            host=(kept | way if offload else {}) | copies,
        )
