"""The teacher as a command opens it, once: its files, its blocks, how it is called, one empty model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_ds.data.noising import NoisyBatch
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import CaptionEncoding
from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Wanted, block_shapes
from ppcl_ds.teacher.call import Caller, caller_for
from ppcl_ds.teacher.files import ModelFiles


class Teacher:
    """A teacher that was looked at but not loaded.

    Args:
        path: a diffusers transformer folder, or a pipeline folder with `transformer/`.
        weights: whether tensors will be read; without them, `config.json` is enough.

    Attributes:
        files: its tensors and configuration on disk.
        anatomy: its blocks, and taps that record what passes through them.

    Raises:
        UserError: it is not there, or not a diffusers transformer.
    """

    def __init__(self, path: Path, weights: bool = True) -> None:
        self.files = ModelFiles(path, weights)
        self.anatomy = Anatomy(self.empty)

    @property
    def class_name(self) -> str:
        return self.files.class_name

    @property
    def blocks(self) -> Sequence[Block]:
        return self.anatomy.blocks

    @property
    def caller(self) -> Caller:
        """How its `forward` is called.

        Raises:
            UserError: it is of a family that cannot be called yet.
        """
        return caller_for(self.class_name)

    @cached_property
    def empty(self) -> Any:
        """Its one empty model: parameters on the meta device, RoPE tables real. Everybody reads it, nobody changes it:
        who needs to, copies a part of it or builds another by `files.empty_model()`."""
        return self.files.empty_model()

    def module(self, block: Block) -> nn.Module:
        return self.anatomy.module(self.empty, block)

    def filled(self, key: str) -> nn.Module:
        """A part of the teacher with its stored weights, on the CPU; a copy, to do with as one likes.

        Args:
            key: as in a state dict, such as `transformer_blocks.7` or `transformer_blocks.7.img_mlp`.
        """
        return self.files.filled(self.empty.get_submodule(key), key)

    @cached_property
    def allowed_spans(self) -> frozenset[tuple[int, int]]:
        """All spans [u, v], u < v, whose place a copy of block u can take in a stock model.

        A span stays inside one list. If it closes the list, block u must have the shapes of the list's last block,
        which the stock class builds there (SD3's last block has no text output).
        """
        shapes = [block_shapes(self.module(block)) for block in self.blocks]
        return frozenset(
            (u.index, v.index)
            for u in self.blocks
            for v in self.blocks[u.index + 1 :]
            if u.list_name == v.list_name and (not v.last or shapes[u.index] == shapes[v.index])
        )


def open_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher, all of whose tensors are there and which reads the recipe's captions.

    Raises:
        UserError: it cannot be called (see `Teacher`), lacks a tensor, or captions are encoded for another model.
    """
    teacher = Teacher(recipe.teacher.path)
    _ = teacher.caller
    missing = sorted(name for name, _ in teacher.empty.named_parameters() if name not in teacher.files.keys)
    if missing:
        raise UserError(f"teacher {teacher.files.folder}: tensor '{missing[0]}' is missing from the safetensors files")
    check_captions(recipe.data.captions, teacher.empty)
    return teacher


def check_captions(captions: CaptionEncoding, model: Any) -> None:
    """Refuse captions that are encoded for another model.

    Args:
        model: the teacher or a variant, empty or not.

    Raises:
        UserError: their embeddings are not as wide as those that the model reads.
    """
    for key, own in (("joint_attention_dim", captions.width), ("pooled_projection_dim", captions.pooled_width)):
        wide = model.config.get(key, own)  # the model's: a file may have keys that its class does not know
        if wide != own:
            raise UserError(f"data.captions gives embeddings {own} channels wide, but the teacher's {key} is {wide}")


@torch.no_grad()
def read_teacher(model: nn.Module, teacher: Teacher, batch: NoisyBatch, wanted: Wanted | None = None) -> Capture:
    """One forward of the teacher with its boundaries recorded.

    Args:
        model: the transformer or a ZeRO-3 engine around it; then every rank must call this together.
        wanted: what is recorded, and so where the forward may end; everything by default.
    """
    with teacher.anatomy.record(getattr(model, "module", model), wanted) as capture:
        teacher.caller.run(model, batch.latents, batch.prompts, batch.sigmas)
    return capture


@torch.no_grad()
def unread_streams(model: nn.Module, teacher: Teacher, batch: NoisyBatch) -> list[str]:
    """Streams that leave the last block and are read by nobody.

    Found by poisoning: if the velocity stays finite when a stream is all NaN, the teacher does not look at it. Units at
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
        velocity = teacher.caller(model, batch.latents, batch.prompts, batch.sigmas)
        handle.remove()
        if bool(velocity.isfinite().all()):
            unread.append(stream)
    return unread


def _poison(block: Block, stream: str) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        streams = block.read_output(output)
        return block.write_output({s: t * torch.nan if s == stream else t for s, t in streams.items()})

    return hook
