"""The teacher as a command opens it, once: its files, its blocks, the pipeline that calls it, one empty model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Wanted, block_shapes
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.flows import Flows, Run, learn_flows
from ppcl_ds.teacher.keys import Keys, find_keys
from ppcl_ds.teacher.noising import DTYPES, NoisyBatch
from ppcl_ds.teacher.own import own_of
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall
from ppcl_ds.teacher.replacing import joined

_SIDES = (256, 64, 16, 8)
"""Pixels of a side that a pipeline is asked for where nobody says how many; small models cannot draw large ones."""

_FRAMES = 9
"""Of a clip, likewise: what every video VAE can encode."""


class Teacher:
    """A teacher that was looked at but not loaded.

    Args:
        path: a diffusers pipeline folder.
        weights: whether tensors will be read; without them, configurations are enough.
        component: the transformer, where the pipeline has two.
        options: arguments of the pipeline's call that differ from its own defaults.
        dtype: that the transformer runs in.
        size: that its pipeline can be asked for; None: one is found.
        run: calls its transformer once; None: as its pipeline does. With it, `path` may be a transformer's folder.

    Attributes:
        files: its tensors and configuration on disk.

    Raises:
        UserError: it is not there, or not a diffusers transformer.
    """

    def __init__(
        self,
        path: Path,
        weights: bool = True,
        *,
        component: str = "transformer",
        options: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        size: Size | None = None,
        run: Run | None = None,
    ) -> None:
        self.path, self.component, self.options, self.dtype = path, component, options, dtype
        self.files = ModelFiles(path, weights, component)
        self.run = run or self._called_by_its_pipeline
        self._size = size
        self.shortened: dict[tuple[int, ...], Any] = {}
        """What `surgery.shorten` has made of it."""

    @cached_property
    def call(self) -> PipelineCall:
        """Its pipeline as its caller.

        Raises:
            UserError: it has none, or one whose transformer cannot be asked for.
        """
        return PipelineCall(self.path, self.component, self.options, dtype=self.dtype)

    @cached_property
    def size(self) -> Size:
        """A size that its pipeline can be asked for.

        Raises:
            UserError: it cannot be asked for any.
        """
        if self._size and not self.call.draws_clips:
            return self._size
        if self._size:
            with suppress(UserError):
                self.call.latents_shape(self._size)
                return self._size
            return replace(self._size, frames=_FRAMES)  # what begins with a given frame draws none of one
        for side in _SIDES[:-1]:
            with suppress(UserError):
                self.call.latents_shape(found := Size(side, side, _FRAMES))
                return found
        self.call.latents_shape(found := Size(_SIDES[-1], _SIDES[-1], _FRAMES))
        return found

    def example(self, size: Size | None = None, batch: int = 1) -> Arguments:
        """Arguments of its forward for samples of a size, whose shapes are right; their values mean nothing.

        Raises:
            UserError: its pipeline cannot be asked for such samples.
        """
        size, call = size or self.size, self.call
        rungs = call.own_rungs(size)
        latents = torch.zeros(batch, *call.latents_shape(size)[1:], dtype=self.dtype)
        return call.arguments(latents, rungs[len(rungs) // 2], call.example(size, batch).to(self.dtype), size)

    def _called_by_its_pipeline(self, model: nn.Module) -> Any:
        """Run an empty model, whose parameters are float32 whatever the teacher runs in."""

        def float32(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.is_floating_point() else tensor

        return model(**pytree.tree_map_only(Tensor, float32, self.example()))

    def answer(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """What a model puts out for a micro-batch, (B, ...) as the scheduler steps by it.

        Args:
            model: the transformer, a variant, or an engine around one; where it is spread over ranks, all of them must
                call this together.
        """
        return self.call.stepped_by(forward(model, batch.arguments), batch.size)

    @cached_property
    def flows(self) -> Flows:
        """Its lists of blocks and the streams that flow in them.

        Raises:
            UserError: it has none, or it cannot be called.
        """
        if self.run != self._called_by_its_pipeline:
            return learn_flows(self.empty, self.run)
        # The one forward also tells what an example needs to know; large models take seconds for it.
        call, size = self.call, self.size
        flows = learn_flows(call.transformer, lambda _: call.look(size))
        self.example()
        return flows

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its blocks, and taps that record what passes through them."""
        return Anatomy(self.empty, self.flows)

    @property
    def class_name(self) -> str:
        return self.files.class_name

    @property
    def blocks(self) -> Sequence[Block]:
        return self.anatomy.blocks

    @cached_property
    def empty(self) -> Any:
        """Its one empty model: parameters on the meta device, RoPE tables real. Everybody reads it, nobody changes it:
        who needs to, copies a part of it or builds another by `files.empty_model()`."""
        return self.files.empty_model()

    @cached_property
    def keys(self) -> Keys:
        """The keys of its configuration that follow its blocks."""
        return find_keys(self.files, self.empty, own_of(self.class_name).entries)

    def module(self, block: Block) -> nn.Module:
        return self.anatomy.module(self.empty, block)

    def filled(self, key: str) -> nn.Module:
        """A part of the teacher with its stored weights, on the CPU; a copy, to do with as one likes.

        Args:
            key: as in a state dict, such as `transformer_blocks.7` or `transformer_blocks.7.img_mlp`.
        """
        return self.files.filled(self.empty.get_submodule(key), key)

    @property
    def keeps_its_blocks(self) -> str:
        """Why no block of it can be taken out, for a person; empty where some can."""
        if any(flow.skips for flow in self.flows):
            return "its blocks also read what blocks long before them returned"
        return own_of(self.class_name).refused

    @cached_property
    def plannable_spans(self) -> frozenset[tuple[int, int]]:
        """Of `allowed_spans`, those that a plan may choose each by itself.

        Lists whose length is one key can only lose as many blocks each; nobody but a person plans for that.
        """
        ran = {flow.name for flow in self.flows}
        paired = {name for names in self.keys.lengths.values() if len(names & ran) > 1 for name in names}
        if self.keeps_its_blocks:
            return frozenset()
        return frozenset(span for span in self.allowed_spans if self.blocks[span[0]].list_name not in paired)

    @cached_property
    def allowed_spans(self) -> frozenset[tuple[int, int]]:
        """All spans [u, v], u < v, whose place a copy of block u can take in a stock model.

        A span stays inside one list, and crosses no place where the teacher does something to a stream between two
        blocks. If it closes the list, block u must have the shapes of the list's last block, which the stock class
        builds there (SD3's last block has no text output).
        """
        shapes = [block_shapes(self.module(block)) for block in self.blocks]
        closing = [block.index for block in self.blocks if block.closes]
        return frozenset(
            (u.index, v.index)
            for u in self.blocks
            for v in self.blocks[u.index + 1 : next(index for index in closing if index >= u.index) + 1]
            if not v.last or shapes[u.index] == shapes[v.index]
        )


def forward(model: nn.Module, arguments: Arguments) -> Tensor:
    """What a transformer puts out for arguments of its forward, (B, ...); for several kinds of latents flat, (B, N)."""
    kinds = own_of(type(getattr(model, "module", model)).__name__).kinds
    output = model(**arguments | {"return_dict": False})
    parts = (output,) if isinstance(output, Tensor) else output[:kinds]  # Kandinsky 5 returns it by itself
    return joined([torch.stack(each) if isinstance(each, list) else each for each in parts])


def text_mask(arguments: Arguments, capture: Capture) -> Tensor | None:
    """Which tokens of the text stream count, (B, S) bool; None: all.

    The argument that says so is known by its name and its shape.
    """
    tokens = next((streams["text"].shape[1] for streams in capture.streams.values() if "text" in streams), 0)
    for name, value in arguments.items():
        if "mask" in name and isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == tokens:
            return value.bool()
    return None


def open_teacher(recipe: Recipe, weights: bool = True) -> Teacher:
    """The recipe's teacher, whose tensors are what its configuration says.

    Args:
        weights: whether tensors will be read.

    Raises:
        UserError: it cannot be called (see `Teacher`), or its tensors are others.
    """
    settings, side = recipe.teacher, recipe.data.images.size
    teacher = Teacher(
        settings.folder,
        weights,
        component=settings.component,
        options=settings.options,
        dtype=DTYPES[settings.precision],
        size=Size(side, side),
    )
    _ = teacher.call
    if weights:
        teacher.files.check(teacher.empty)
    return teacher


@torch.no_grad()
def read_teacher(model: nn.Module, teacher: Teacher, batch: NoisyBatch, wanted: Wanted | None = None) -> Capture:
    """One forward of the teacher with its boundaries recorded.

    Args:
        model: the transformer or a ZeRO-3 engine around it; then every rank must call this together.
        wanted: what is recorded, and so where the forward may end; everything by default.
    """
    with teacher.anatomy.record(getattr(model, "module", model), wanted) as capture:
        capture.output = forward(model, batch.arguments)
    return capture


@torch.no_grad()
def unread_streams(model: nn.Module, teacher: Teacher, batch: NoisyBatch) -> list[str]:
    """Streams that leave the last block and are read by nobody.

    Found by poisoning: if the output stays finite when a stream is all NaN, the teacher does not look at it. Units at
    the end must not be trained on such a stream: its values mean nothing. Collective like `read_teacher`.
    """
    block = teacher.blocks[-1]
    unread = []
    for stream in block.returns:
        if stream == "image":
            continue
        handle = teacher.anatomy.module(getattr(model, "module", model), block).register_forward_hook(
            _poison(block, stream)
        )
        output = forward(model, batch.arguments)
        handle.remove()
        if bool(output.isfinite().all()):
            unread.append(stream)
    return unread


def _poison(block: Block, stream: str) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        streams = block.read_output(output)
        return block.write_output({s: t * torch.nan if s == stream else t for s, t in streams.items()})

    return hook
