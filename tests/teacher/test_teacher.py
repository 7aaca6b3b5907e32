"""A teacher that was looked at but not loaded: how its transformer is called, and what its answers mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Capture
from ppcl_ds.teacher.noising import NoisyBatch
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_run import RUNGS
from ppcl_ds.teacher.teacher import Teacher, text_mask
from tests.calls import random_arguments
from tests.conftest import TEACHERS, make_teacher
from tests.families.pipelines import PIPELINES
from tests.pipelines import OPTIONS, make

SIZE = Size(8, 8)
UNGUIDED = {"qwen": {"true_cfg_scale": 1.0}, "flux": {}, "sd3": {"guidance_scale": 1.0}}
CAPTIONS = ["one two three " * 7 + "four five"] * 2
"""As many words as the usual caption has, which only Qwen-Image's tiny pipeline reads whole."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> its pipeline's folder, without the weights of anything."""
    root = tmp_path_factory.mktemp("teachers")

    def saved(family: str) -> Path:
        if not (root / family).exists():
            make_teacher(family, root / family)
            for weights in (root / family / "transformer").glob("*.safetensors"):
                weights.unlink()
        return root / family

    return saved


def watched(pipe: Any, **call: Any) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """What a stock pipeline calls its transformer with while it draws, and by what its scheduler steps."""
    called: list[dict[str, Any]] = []
    outputs: list[Tensor] = []
    scheduler = type(pipe.scheduler)
    step = scheduler.step

    @functools.wraps(step)
    def scheduler_step(self: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output.clone())
        return step(self, model_output, *args, **kwargs)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        names = ("hidden_states", "timestep", "encoder_hidden_states")  # Z-Image gives its own by their places
        given = dict(zip(("x", "t", "cap_feats") if "ZImage" in type(module).__name__ else names, args, strict=False))
        called.append(pytree.tree_map_only(Tensor, torch.clone, given | kwargs))

    pipe.set_progress_bar_config(disable=True)
    handle = pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", scheduler_step)
        pipe(**call, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))
    handle.remove()
    return called, outputs


def shapes(arguments: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in arguments.items() if value is not None and key != "return_dict"}
    return pytree.tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), given)


@pytest.mark.parametrize("size", [SIZE, Size(4, 8)], ids=["square", "wide"])
@pytest.mark.parametrize("family", TEACHERS)
def test_an_example_has_the_shapes_of_the_stock_pipelines_calls(
    folder: Callable[[str], Path], family: str, size: Size
) -> None:
    teacher = Teacher(folder(family), False, options=OPTIONS[family], size=SIZE)
    call = {"height": size.height, "width": size.width, **OPTIONS[family], **UNGUIDED[family]}
    for batch in (1, 2):
        [expected, *_], _ = watched(make(family), prompt=CAPTIONS[:batch], **call)
        assert shapes(teacher.example(size, batch)) == shapes(expected)
    if size == SIZE:
        assert shapes(teacher.example()) == shapes(teacher.example(SIZE, 1))


def test_an_example_is_in_the_dtype_that_the_teacher_runs_in(folder: Callable[[str], Path]) -> None:
    teacher = Teacher(folder("sd3"), False, options=OPTIONS["sd3"], dtype=torch.bfloat16, size=SIZE)
    floats = {key: value.dtype for key, value in teacher.example().items() if isinstance(value, Tensor)}
    assert {floats[key] for key in ("hidden_states", "encoder_hidden_states", "pooled_projections")} == {torch.bfloat16}


def test_a_size_is_found_where_nobody_says_one(folder: Callable[[str], Path]) -> None:
    assert Teacher(folder("qwen"), False).size == Size(256, 256, 9)


def test_looking_at_a_teacher_runs_its_transformer_once(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones take seconds for it, on every rank."""
    forward, ran = diffusers.QwenImageTransformer2DModel.forward, 0

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(diffusers.QwenImageTransformer2DModel, "forward", counted)
    teacher = Teacher(folder("qwen"), False, size=SIZE)
    assert len(teacher.blocks) == 6
    teacher.example(SIZE, batch=2)
    teacher.call.to_step(SIZE)
    assert ran == 1


def test_what_cannot_be_called_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    alone = folder("qwen") / "transformer"
    with pytest.raises(UserError, match="give a diffusers pipeline folder"):
        _ = Teacher(alone, False).blocks
    with pytest.raises(UserError, match="takes no argument 'prompts'"):
        _ = Teacher(folder("qwen"), False, options={"prompts": 1}).call
    with pytest.raises(UserError, match="have to be multiples of 2"):
        Teacher(folder("qwen"), False).example(Size(7, 8))


@pytest.mark.parametrize("family", [*TEACHERS, "z_image"])
@torch.no_grad()
def test_an_answer_is_what_the_stock_pipelines_scheduler_steps_by(family: str, tmp_path: Path) -> None:
    """Z-Image's transformer puts out a list, which its pipeline turns and negates."""
    if family == "z_image":
        tiny = PIPELINES[family]
        pipe, call, size = tiny.make(), dict(tiny.call), Size(tiny.call["height"], tiny.call["width"])
    else:
        pipe, size = make(family), SIZE
        call = {"prompt": ["one two", "three"], "height": 8, "width": 8, **OPTIONS[family], **UNGUIDED[family]}
    pipe.save_pretrained(tmp_path)
    options = {key: value for key, value in call.items() if key == "max_sequence_length"}
    teacher = Teacher(tmp_path, options=options)
    called, outputs = watched(pipe, **call)
    for arguments, expected in zip(called, outputs, strict=True):
        arguments.pop("return_dict", None)
        found = teacher.answer(pipe.transformer, NoisyBatch(arguments, torch.zeros(()), size))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


TEXT = Capture(streams={0: {"image": torch.zeros(2, 16, 4), "text": torch.zeros(2, 5, 4)}})
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("name", ["encoder_hidden_states_mask", "encoder_attention_mask", "attention_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_text_mask_is_the_argument_that_is_one(name: str, dtype: torch.dtype) -> None:
    arguments = {"timestep": MASK[0], "image_mask": torch.zeros(2, 16), name: MASK.to(dtype)}
    found = text_mask(arguments, TEXT)
    assert found is not None
    assert found.dtype == torch.bool
    assert torch.equal(found, MASK.bool())


def test_all_tokens_count_where_nothing_says_otherwise() -> None:
    assert text_mask({"encoder_hidden_states_mask": None, "timestep": MASK}, TEXT) is None
    assert text_mask(random_arguments("SD3Transformer2DModel"), TEXT) is None
    alone = Capture(streams={0: {"image": torch.zeros(2, 5, 4)}})
    assert text_mask({"encoder_attention_mask": MASK}, alone) is None, "no text flows through the blocks"


@pytest.mark.parametrize("family", TEACHERS)
def test_one_transformer_is_asked_at_every_rung(folder: Callable[[str], Path], family: str) -> None:
    call = Teacher(folder(family), False, options=OPTIONS[family]).call
    assert call.own_rungs(SIZE) == range(RUNGS)


def test_each_of_two_transformers_has_its_side_of_the_boundary(tmp_path: Path) -> None:
    """Wan 2.2 asks the first above its boundary and the second below."""
    tiny = PIPELINES["wan22"]
    pipe = tiny.make()
    pipe.save_pretrained(tmp_path)
    pipe.scheduler.set_timesteps(RUNGS)
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    above = int((pipe.scheduler.timesteps >= boundary).sum())
    assert 0 < above < RUNGS
    size = Size(tiny.call["height"], tiny.call["width"], tiny.call["num_frames"])
    first, second = (PipelineCall(tmp_path, name) for name in ("transformer", "transformer_2"))
    assert (first.own_rungs(size), second.own_rungs(size)) == (range(above), range(above, RUNGS))
    latents, prompt = torch.zeros(first.latents_shape(size)), first.example(size)
    first.arguments(latents, above - 1, prompt, size)
    with pytest.raises(UserError, match="another transformer than transformer is asked"):
        first.arguments(latents, above, prompt, size)
