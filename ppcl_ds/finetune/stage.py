"""A stage of a variant: the model's own forward, of which only some blocks are here.

Every stage runs the family's unchanged `forward` on the micro-batch's own arguments. Embeddings
and conditioning (time, RoPE, masks) are computed where they are needed, as that takes less than sending them; what the
blocks of earlier stages return is received instead, and after the stage's last block the forward ends. So nothing here
knows of any family.

Shapes: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl_ds.data.batch import Size
from ppcl_ds.finetune.trainable import IDLE, Part
from ppcl_ds.teacher.anatomy import Anatomy, Block, EarlyExit, Streams
from ppcl_ds.teacher.files import empty_model
from ppcl_ds.teacher.flows import Flows
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall
from ppcl_ds.teacher.teacher import forward
from ppcl_ds.training.log import Means
from ppcl_ds.units.depth import recompute_parts
from ppcl_ds.units.loss import boundary_loss
from ppcl_ds.units.unit import UnitBatch
from ppcl_ds.units.variant import Layout


class _Elsewhere(nn.Module):
    """In the place of a block of an earlier stage.

    Attributes:
        arriving: what the last of them returned, laid flat; None: the streams pass as they came, and nobody reads them.
    """

    def __init__(self, block: Block, module: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.like = (module,)  # for the names of its arguments; in a tuple, so that it is no part of this module
        self.arriving: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returned on its own stage."""
        streams, _ = self.block.split_call(self.like[0], args, kwargs)
        if self.arriving is not None:
            streams |= _unpacked(self.arriving, {stream: streams[stream] for stream in self.block.returns})
        return self.block.write_output(streams)


def stage_batch(
    arguments: Arguments, size: Size, targets: dict[str, Tensor], text_mask: Tensor | None = None
) -> UnitBatch:
    """A micro-batch as a stage reads it.

    Args:
        arguments: of the teacher's forward.
        targets: of the last stage, `velocity`, and `flow` unless samples are of trajectories; `boundary/BLOCK/STREAM`
            of whichever has the block.
    """
    return UnitBatch({}, {"arguments": arguments, "size": size}, targets, text_mask)


def weighted(measured: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The loss: the weighted sum of `flow/loss`, `velocity/loss` and `boundary/BLOCK/STREAM/loss`."""
    losses = {name: value for name, value in measured.items() if name.endswith("/loss")}
    return sum(weights[name.split("/")[0]] * value for name, value in losses.items())


def _recompute(block: nn.Module, whole: bool) -> None:
    """Have a block compute its activations again in the backward pass.

    Args:
        whole: False where the block also reads what another block left behind: that is another micro-batch's by then,
            so only its parts, which are handed all they read, compute anew.
    """
    if whole:  # nothing in it is random, so there is no random state to bring back
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    else:
        recompute_parts(block)


def _packed(streams: Streams) -> Tensor:
    """All streams as one vector: one message, and one backward pass through the stage."""
    return torch.cat([tensor.flatten() for tensor in streams.values()])


def _unpacked(flat: Tensor, like: Streams) -> Streams:
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {stream: piece.view(like[stream].shape) for (stream, piece) in zip(like, pieces, strict=True)}


class _AddLoss(torch.autograd.Function):
    """Passes a tensor on; on the way back, a loss of this stage's own joins in."""

    @staticmethod
    def forward(ctx: Any, passing: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return passing.view_as(passing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.full_like(ctx.like, ctx.scale), None


class Stage(nn.Module):
    """One stage of a variant, as the one layer that this rank has of the pipeline.

    It reads each micro-batch from `inbox`, in turn. While training, the last stage returns the loss, (); else,
    what the model puts out. Earlier stages return their streams as one vector.

    Args:
        number: of the stage.
        bounds: first block of each stage, and the number of blocks.
        layout: the variant; tensors that are not this stage's are not read.
        parts: everything that is trained, on all stages.
        weights: of the losses `flow`, `velocity` and `boundary`.
        magnitude_weight: see `boundary_loss`.
        scale: what a micro-batch's loss counts for in a step's.
        checkpointing: compute a block's activations again in the backward pass.
    """

    def __init__(
        self,
        number: int,
        bounds: Sequence[int],
        layout: Layout,
        parts: Sequence[Part],
        call: PipelineCall,
        flows: Flows,
        inbox: deque[UnitBatch],
        weights: Mapping[str, float],
        magnitude_weight: float,
        scale: float,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.call, self.inbox, self.weights, self.scale = call, inbox, weights, scale
        self.magnitude_weight = magnitude_weight
        self.means = Means()
        self.reached: dict[int, Streams] = {}
        """What has left each block of this stage, while its forward runs."""
        self.said: list[Tensor] | None = None
        """What the model has put out while it was trained, (B, ...), on the last stage, if somebody wants to know."""
        first, stop = bounds[number], bounds[number + 1]
        self.last = number == len(bounds) - 2
        model: Any = empty_model(layout.config)
        blocks = Anatomy(model, flows).blocks
        self.blocks = blocks[first:stop]
        self.before: _Elsewhere | None = None
        for block in blocks[:first]:
            self.before = _Elsewhere(block, model.get_submodule(block.key))
            model.set_submodule(block.key, self.before)
        for block in blocks[stop:]:
            model.set_submodule(block.key, nn.Identity())  # the forward does not get there
        model.load_state_dict({name: layout.tensors[name].load() for name in model.state_dict()}, assign=True)
        named = dict(model.named_parameters())
        here = [part for part in parts if part.place is None or first <= part.place < stop]
        self.parts = {part.name: {name: named[name].requires_grad_(True) for name in part.parameters} for part in here}
        if not self.parts:  # torch's optimizers want something
            self.idle = nn.Parameter(torch.zeros(1))
            self.parts = {IDLE: {IDLE: self.idle}}
        reads = set(layout.config.get("linear_text") or ())
        for block in self.blocks:
            module = model.get_submodule(block.key)
            module.register_forward_hook(partial(self._note, block, block is self.blocks[-1] and not self.last))
            if checkpointing:
                _recompute(module, whole=block.key not in reads)
        self.model = model

    def train(self, mode: bool = True) -> Stage:
        """Whether to return losses; the model itself stays as in inference, as the teacher does."""
        self.training = mode
        return self

    def forward(self, wire: Tensor) -> Tensor:
        """What the stage before sent -> what this one sends."""
        batch = self.inbox.popleft()
        if self.before is not None:
            self.before.arriving = wire
        given = batch.conditioning
        try:
            output = forward(self.model, given["arguments"])
            if self.training and self.said is not None:
                self.said.append(output.detach())
            return self._loss(self.call.stepped_by(output, given["size"]), batch) if self.training else output
        except EarlyExit:
            return self._sent(batch)
        finally:
            self.reached = {}

    def _note(self, block: Block, leaves: bool, module: nn.Module, args: Any, output: Any) -> None:
        self.reached[block.index] = block.read_output(output)
        if leaves:
            raise EarlyExit

    def _sent(self, batch: UnitBatch) -> Tensor:
        wire = _packed(self.reached[self.blocks[-1].index])
        if not self.training:
            return wire
        if not wire.requires_grad:  # nothing is trained up to here; DeepSpeed walks back all the same
            wire = wire.detach().requires_grad_()
        measured = self._boundary_losses(batch)
        self.means.add(measured)
        if measured:
            wire = _AddLoss.apply(wire, weighted(measured, self.weights), self.scale)
        return wire

    def _loss(self, velocity: Tensor, batch: UnitBatch) -> Tensor:
        targets = {name: batch.targets[name] for name in ("flow", "velocity") if name in batch.targets}
        errors = {name: (velocity.float() - target.float()).square().mean() for name, target in targets.items()}
        measured = {f"{name}/loss": error for name, error in errors.items()} | self._boundary_losses(batch)
        self.means.add(measured)
        return weighted(measured, self.weights)

    def _boundary_losses(self, batch: UnitBatch) -> dict[str, Tensor]:
        found = {}
        for name, target in batch.targets.items():
            kind, *where = name.split("/")
            if kind == "boundary":
                place, stream = where
                own = self.reached[int(place)][stream]
                found[f"{name}/loss"] = boundary_loss(own, target, batch.mask_of(stream), self.magnitude_weight)
        return found
