"""The anatomy: what is recorded is what plain hooks see, and blocks called on it give the teacher's own boundaries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Streams
from tests.anatomies import anatomy_of
from tests.conftest import TEACHERS, WAN


@dataclass(frozen=True)
class Case:
    """A tiny teacher, how to call it, and what a reader of its source knows about its blocks.

    Attributes:
        lists: block list -> length, in the order in which `forward` runs them.
        places: stream -> its place in what a block returns.
    """

    class_name: str
    config: dict[str, Any]
    lists: dict[str, int]
    places: dict[str, int]
    inputs: dict[str, Any]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TIMES = torch.tensor([200.0, 700.0])
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
IMAGE_IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))

CASES = {
    "qwen": Case(
        *TEACHERS["qwen"],
        lists={"transformer_blocks": 6},
        places={"text": 0, "image": 1},
        inputs={
            "hidden_states": noise(2, 16, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "encoder_hidden_states_mask": TEXT_MASK,
            "timestep": TIMES / 1000,
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "flux": Case(
        *TEACHERS["flux"],
        lists={"transformer_blocks": 4, "single_transformer_blocks": 5},
        places={"text": 0, "image": 1},
        inputs={
            "hidden_states": noise(2, 16, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "pooled_projections": noise(2, 8),
            "timestep": TIMES / 1000,
            "img_ids": IMAGE_IDS,
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "sd3": Case(
        *TEACHERS["sd3"],
        lists={"transformer_blocks": 6},
        places={"text": 0, "image": 1},
        inputs={
            "hidden_states": noise(2, 1, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "pooled_projections": noise(2, 8),
            "timestep": TIMES,
        },
    ),
    "wan": Case(
        *WAN,
        lists={"blocks": 3},
        places={"image": 0},
        inputs={
            "hidden_states": noise(2, 4, 2, 4, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": TIMES.long(),
        },
    ),
    "ltx": Case(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "num_layers": 3,
        },
        lists={"transformer_blocks": 3},
        places={"image": 0},
        inputs={
            "hidden_states": noise(2, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "encoder_attention_mask": TEXT_MASK,
            "timestep": TIMES.long(),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
    ),
    "hunyuan_video": Case(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": [2, 4, 4],
        },
        lists={"transformer_blocks": 2, "single_transformer_blocks": 3},
        places={"image": 0, "text": 1},
        inputs={
            "hidden_states": noise(2, 4, 2, 4, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "encoder_attention_mask": TEXT_MASK.long(),
            "pooled_projections": noise(2, 8),
            "timestep": TIMES.long(),
            "guidance": torch.full((2,), 6000.0),
        },
    ),
    "cogvideox": Case(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 3,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        },
        lists={"transformer_blocks": 3},
        places={"image": 0, "text": 1},
        inputs={
            "hidden_states": noise(2, 3, 4, 4, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "timestep": TIMES.long(),
        },
    ),
}


def teacher_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, case.class_name)(**case.config).eval()


@torch.no_grad()
def run(model: nn.Module, case: Case) -> Tensor:
    return model(**case.inputs, return_dict=False)[0]


def called(case: Case) -> Callable[[nn.Module], Tensor]:
    return partial(run, case=case)


def modules_of(model: nn.Module, case: Case) -> list[nn.Module]:
    return [block for name in case.lists for block in getattr(model, name)]


@dataclass(frozen=True)
class Seen:
    """One call of a block as plain hooks see it: the block, copies of its streams, and what it returned."""

    module: nn.Module
    entered: Streams
    output: Any


def watch(model: nn.Module, case: Case) -> list[Seen]:
    """Every call of every block, in order of execution."""
    seen: list[Seen] = []
    names = {"image": "hidden_states", "text": "encoder_hidden_states"}  # the first two arguments in all families

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(names.values(), args, strict=False)) | kwargs
        entered = {stream: given[names[stream]].clone() for stream in case.places}
        seen.append(Seen(module, entered, output))

    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in modules_of(model, case)]
    run(model, case)
    for handle in handles:
        handle.remove()
    return seen


def tensors(output: Any, case: Case) -> Streams:
    if isinstance(output, Tensor):
        return {"image": output}
    return {stream: output[place] for stream, place in case.places.items() if output[place] is not None}


def assert_same(recorded: Streams, expected: Streams) -> None:
    assert recorded.keys() == expected.keys()
    for stream, tensor in expected.items():
        assert torch.equal(recorded[stream], tensor), stream


every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_family
def test_blocks_are_numbered_in_the_order_of_execution(case: Case) -> None:
    model = teacher_of(case)
    anatomy = anatomy_of(model, called(case))
    executed = [seen.module for seen in watch(model, case)]
    assert [block.index for block in anatomy.blocks] == list(range(sum(case.lists.values())))
    assert [anatomy.module(model, block) for block in anatomy.blocks] == executed
    assert [block.key for block in anatomy.blocks] == [
        f"{n}.{i}" for n, size in case.lists.items() for i in range(size)
    ]
    assert len(anatomy) == len(executed)


@every_family
def test_every_list_has_a_closing_boundary_of_its_own(case: Case) -> None:
    expected, boundary = [], 0
    for size in case.lists.values():
        expected += [(boundary + i, boundary + i + 1, i == size - 1) for i in range(size)]
        boundary += size + 1
    assert [(b.entering, b.leaving, b.last) for b in anatomy_of(teacher_of(case), called(case)).blocks] == expected


@every_family
def test_recorded_boundaries_are_what_plain_hooks_see(case: Case) -> None:
    model = teacher_of(case)
    anatomy = anatomy_of(model, called(case))
    with anatomy.record(model) as capture:
        run(model, case)
    for block, seen in zip(anatomy.blocks, watch(model, case), strict=True):
        assert_same(capture.streams[block.entering], seen.entered)
        assert_same(capture.streams[block.leaving], tensors(seen.output, case))
    assert len(capture.streams) == len(anatomy) + len(case.lists)


@every_family
@torch.no_grad()
def test_a_copy_of_a_block_called_on_what_was_recorded_gives_the_next_boundary(case: Case) -> None:
    model = teacher_of(case)
    anatomy = anatomy_of(model, called(case))
    with anatomy.record(model) as capture:
        run(model, case)
    for block in anatomy.blocks:
        twin = copy.deepcopy(anatomy.module(model, block))
        output = block.call(twin, capture.streams[block.entering], capture.conditioning[block.index])
        assert_same(output, capture.streams[block.leaving])


@every_family
def test_a_block_called_on_other_streams_gives_other_output(case: Case) -> None:
    model = teacher_of(case)
    block = anatomy_of(model, called(case)).blocks[0]
    with anatomy_of(model, called(case)).record(model) as capture:
        run(model, case)
    streams = {stream: tensor + 1 for stream, tensor in capture.streams[block.entering].items()}
    output = block.call(modules_of(model, case)[0], streams, capture.conditioning[0])
    for stream, tensor in output.items():
        assert not torch.equal(tensor, capture.streams[block.leaving][stream])


@every_family
def test_recording_leaves_the_model_and_its_output_alone(case: Case) -> None:
    model = teacher_of(case)
    before = run(model, case)
    with anatomy_of(model, called(case)).record(model):
        during = run(model, case)
    assert torch.equal(during, before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in modules_of(model, case))


@every_family
def test_written_output_is_what_was_read(case: Case) -> None:
    model = teacher_of(case)
    for block, seen in zip(anatomy_of(model, called(case)).blocks, watch(model, case), strict=True):
        written = block.write_output(block.read_output(seen.output))
        assert type(written) is type(seen.output)
        pairs: Sequence[tuple[Any, Any]] = [(written, seen.output)]
        if not isinstance(written, Tensor):
            pairs = list(zip(written, seen.output, strict=True))
        assert all(mine is theirs for mine, theirs in pairs)


@every_family
def test_the_anatomy_of_an_empty_model_is_that_of_the_full_one(case: Case) -> None:
    model = teacher_of(case)
    with init_empty_weights():
        empty = getattr(diffusers, case.class_name)(**case.config)
    assert anatomy_of(empty, called(case)).blocks == anatomy_of(model, called(case)).blocks
    sizes = [sum(p.numel() for p in block.parameters()) for block in modules_of(model, case)]
    assert [block.parameters for block in anatomy_of(empty, called(case)).blocks] == sizes
    assert anatomy_of(empty, called(case)).block_parameters == sum(sizes)


def test_a_model_without_lists_of_blocks_is_refused_by_name() -> None:
    model = diffusers.UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1
    )
    with pytest.raises(UserError, match="UNet2DModel"):
        anatomy_of(model, lambda unet: unet(noise(1, 3, 8, 8), 1))
