"""Surgery: a teacher without some of its blocks is a model of the stock class that computes what the teacher would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ppcl_ds.data.batch import Prompts
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.call import caller_for
from ppcl_ds.teacher.files import held
from ppcl_ds.teacher.surgery import lay_out
from ppcl_ds.teacher.teacher import Teacher
from tests.conftest import TEACHERS

SIZES = {"qwen": 6, "flux": 9, "sd3": 6}
FLUX_DOUBLE = range(4)
FLUX_SINGLE = range(4, 9)

Saved = Callable[..., Teacher]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(family, key=value, ...)`: files of a tiny teacher, with a few keys of its configuration changed."""
    made: dict[tuple[str, str], Teacher] = {}

    def save(family: str, **changes: Any) -> Teacher:
        if (family, str(changes)) not in made:
            class_name, config = TEACHERS[family]
            folder: Path = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            getattr(diffusers, class_name)(**config | changes).save_pretrained(folder)
            made[family, str(changes)] = Teacher(folder)
        return made[family, str(changes)]

    return save


def assemble(teacher: Teacher, places: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, sources = lay_out(teacher, [(block, own and held(own)) for block, own in places])
    return config, {name: source.load() for name, source in sources.items()}


def without(teacher: Teacher, removed: set[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    anatomy = teacher.anatomy
    return assemble(teacher, [(index, None) for index in range(len(anatomy)) if index not in removed])


def stock(teacher: Teacher, config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """A fresh model of the stock class, its weights really allocated, every tensor of it given."""
    model = getattr(diffusers, teacher.class_name).from_config(config)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def bypassed(teacher: Teacher, removed: set[int]) -> Any:
    """The teacher with the forwards of some blocks replaced: what enters leaves."""
    model = getattr(diffusers, teacher.class_name).from_pretrained(teacher.files.folder).eval()
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    for index in removed:
        blocks[index].forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    return model


@torch.no_grad()
def velocity(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, 8, 8, generator=generator)
    embeds, pooled = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 8, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.bool)
    caller = caller_for(type(model).__name__)
    return caller(model, latents, Prompts(embeds, mask, pooled), torch.tensor([0.3, 0.8]))


def removals(family: str) -> st.SearchStrategy[set[int]]:
    """Sets of blocks that each list survives; SD3's last block stays, as only it has no text output."""
    if family == "flux":
        double, single = (st.sets(st.sampled_from(part), max_size=len(part) - 1) for part in (FLUX_DOUBLE, FLUX_SINGLE))
        return st.builds(set.union, double, single)
    return st.sets(st.integers(0, SIZES[family] - 2), max_size=SIZES[family] - 1)


@pytest.mark.parametrize("family", TEACHERS)
@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking is slow
@given(data=st.data())
def test_a_model_without_some_blocks_computes_what_the_teacher_does_when_they_are_bypassed(
    saved: Saved, family: str, data: st.DataObject
) -> None:
    teacher = saved(family)
    removed = data.draw(removals(family))
    smaller = stock(teacher, *without(teacher, removed))
    assert len(Anatomy(smaller)) == SIZES[family] - len(removed)
    assert torch.equal(velocity(smaller), velocity(bypassed(teacher, removed)))


@pytest.mark.parametrize(
    ("removed", "doubles", "singles"), [({1}, 3, 5), ({4, 8}, 4, 3), ({0, 1, 2}, 1, 5), ({0, 3, 5, 6, 7, 8}, 2, 1)]
)
def test_flux_loses_blocks_of_either_list(saved: Saved, removed: set[int], doubles: int, singles: int) -> None:
    teacher = saved("flux")
    config, _ = without(teacher, removed)
    assert config == teacher.files.config | {"num_layers": doubles, "num_single_layers": singles}


@pytest.mark.parametrize(
    ("removed", "layers"), [({0}, [0]), ({2, 3}, [0, 1, 3]), ({1}, [0, 3]), ({0, 1, 4}, []), ({0, 1}, [2])]
)
def test_sd3_keeps_dual_attention_in_the_blocks_that_had_it(saved: Saved, removed: set[int], layers: list[int]) -> None:
    teacher = saved("sd3", dual_attention_layers=[0, 1, 4])
    config, tensors = without(teacher, removed)
    remaining = [index for index in range(6) if index not in removed]
    assert config["dual_attention_layers"] == [new for new, old in enumerate(remaining) if old in (0, 1, 4)]
    assert config["num_layers"] == len(remaining)
    assert torch.equal(velocity(stock(teacher, config, tensors)), velocity(bypassed(teacher, removed)))


def test_sd3_cannot_lose_its_last_block(saved: Saved) -> None:
    teacher = saved("sd3")
    with pytest.raises(UserError, match=str(teacher.files.folder)):
        without(teacher, {5})


@pytest.mark.parametrize(
    ("family", "removed"), [("qwen", set(range(6))), ("flux", set(FLUX_DOUBLE)), ("flux", set(FLUX_SINGLE))]
)
def test_losing_a_whole_list_is_refused(saved: Saved, family: str, removed: set[int]) -> None:
    teacher = saved(family)
    with pytest.raises(UserError, match="every block") as refused:
        without(teacher, removed)
    assert str(teacher.files.folder) in str(refused.value)


def test_numbers_that_only_look_like_block_positions_stay(saved: Saved) -> None:
    teacher = saved("qwen", num_layers=8)  # axes_dims_rope is [4, 6, 6]: all of them could be blocks
    config, _ = without(teacher, {4, 6})
    assert config == teacher.files.config | {"num_layers": 6}
    assert config["axes_dims_rope"] == [4, 6, 6]


@pytest.mark.parametrize(
    ("family", "changes", "removed", "expected"),
    [
        ("qwen", {"num_layers": 2}, {1}, {"num_layers": 1}),  # also 2: patch_size and num_attention_heads
        ("flux", {"num_layers": 3, "num_single_layers": 3}, {0, 4, 5}, {"num_layers": 2, "num_single_layers": 1}),
        ("sd3", {"num_layers": 2}, {0}, {"num_layers": 1, "dual_attention_layers": [0]}),
    ],
)
def test_only_the_lengths_change_even_when_other_numbers_equal_them(
    saved: Saved, family: str, changes: dict[str, Any], removed: set[int], expected: dict[str, Any]
) -> None:
    teacher = saved(family, **changes)
    config, tensors = without(teacher, removed)
    assert config == teacher.files.config | expected
    assert torch.equal(velocity(stock(teacher, config, tensors)), velocity(bypassed(teacher, removed)))


@pytest.mark.parametrize("family", TEACHERS)
def test_a_units_tensors_stand_where_its_block_stood(saved: Saved, family: str) -> None:
    teacher = saved(family)
    anatomy = teacher.anatomy
    shapes = {
        name: tensor.shape for name, tensor in bypassed(teacher, set()).transformer_blocks[2].state_dict().items()
    }
    trained = {name: torch.rand(shape, generator=torch.Generator().manual_seed(2)) for name, shape in shapes.items()}
    places = [(index, trained if index == 2 else None) for index in range(len(anatomy)) if index != 1]
    model = stock(teacher, *assemble(teacher, places))

    expected = bypassed(teacher, {1})
    expected.transformer_blocks[2].load_state_dict(trained)
    assert torch.equal(velocity(model), velocity(expected))


def test_tensors_keep_the_number_format_of_the_teachers_files(saved: Saved, tmp_path: Path) -> None:
    source = diffusers.QwenImageTransformer2DModel.from_pretrained(saved("qwen").files.folder)
    source.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = Teacher(tmp_path)
    trained = {name: tensor.float() for name, tensor in source.transformer_blocks[0].state_dict().items()}
    places = [(0, trained), *[(index, None) for index in range(2, 6)]]
    _, tensors = assemble(teacher, places)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
