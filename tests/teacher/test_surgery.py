"""Surgery: a teacher without some of its blocks is a model of the stock class that computes what the teacher would."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ppcl_ds.errors import UserError
from ppcl_ds.teacher import surgery
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.files import find_class, held
from ppcl_ds.teacher.own import Own, own_of
from ppcl_ds.teacher.surgery import lay_out, shorten
from ppcl_ds.teacher.teacher import Teacher
from tests.calls import call_once
from tests.conftest import TEACHERS
from tests.families.teachers import TEACHERS as FAMILIES

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
            made[family, str(changes)] = Teacher(folder, run=call_once)
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
    assert len(Anatomy(smaller, teacher.flows)) == SIZES[family] - len(removed)
    assert torch.equal(call_once(smaller), call_once(bypassed(teacher, removed)))


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
    assert torch.equal(call_once(stock(teacher, config, tensors)), call_once(bypassed(teacher, removed)))


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
    assert torch.equal(call_once(stock(teacher, config, tensors)), call_once(bypassed(teacher, removed)))


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
    assert torch.equal(call_once(model), call_once(expected))


def test_tensors_keep_the_number_format_of_the_teachers_files(saved: Saved, tmp_path: Path) -> None:
    source = diffusers.QwenImageTransformer2DModel.from_pretrained(saved("qwen").files.folder)
    source.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = Teacher(tmp_path, run=call_once)
    trained = {name: tensor.float() for name, tensor in source.transformer_blocks[0].state_dict().items()}
    places = [(0, trained), *[(index, None) for index in range(2, 6)]]
    _, tensors = assemble(teacher, places)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


# Families with something of their own; every family at large stands in tests/families


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Teacher]:
    """`family(name, key=value, ...)`: a tiny teacher's configuration, which is enough to plan for it."""

    def make(name: str, **changes: Any) -> Teacher:
        if name not in FAMILIES:
            pytest.skip(f"this diffusers has no {name}")
        tiny = FAMILIES[name]
        config = {"_class_name": tiny.class_name, **tiny.config, **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return Teacher(tmp_path, weights=False, run=lambda model: model(**copy.deepcopy(tiny.inputs)))

    return make


def test_a_class_that_numbers_what_its_blocks_read_is_refused(
    family: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One table holds the modulations of all of Chroma's blocks; a shorter stock model reads those of other blocks."""
    monkeypatch.setattr(surgery, "own_of", lambda name: Own())
    teacher = family("chroma")
    with pytest.raises(UserError, match="compute something else") as refused:
        shorten(teacher, [index for index in range(len(teacher.blocks)) if index != 1])
    assert "blocks 1 " in str(refused.value)


def test_what_an_own_file_gives_is_checked_by_numbers(
    family: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_of("ChromaTransformer2DModel")

    def turned(*given: Any) -> dict[str, Any]:
        return {"modulation": own.pruned(*given)["modulation"][::-1]}

    monkeypatch.setattr(surgery, "own_of", lambda name: replace(own, pruned=turned))
    teacher = family("chroma")
    with pytest.raises(UserError, match="compute something else"):
        shorten(teacher, [index for index in range(len(teacher.blocks)) if index != 1])


def test_chromas_modulations_stay_with_their_blocks_however_often_some_go(tmp_path: Path) -> None:
    tiny = FAMILIES["chroma"]
    model = diffusers.ChromaTransformer2DModel(**tiny.config).eval()
    model.save_pretrained(tmp_path / "0")

    def run(model: Any) -> Any:
        return model(**copy.deepcopy(tiny.inputs), return_dict=False)[0]

    lists: list[Any] = [model.transformer_blocks, model.single_transformer_blocks]
    for step in range(2):  # of each list its second block, twice
        teacher = Teacher(tmp_path / str(step), run=run)
        kept = [block.index for block in teacher.blocks if block.position != 1]
        config, tensors = assemble(teacher, [(index, None) for index in kept])
        smaller = find_class(config["_class_name"]).from_config(config).eval()
        smaller.load_state_dict(tensors)
        smaller.save_pretrained(tmp_path / str(step + 1))
    assert config["_class_name"] == "PrunedChromaTransformer2DModel"
    for number in (1, 2):
        double, single = (blocks[number] for blocks in lists)
        double.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
        single.forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        torch.testing.assert_close(run(smaller), run(model))


def test_ace_steps_turns_of_attention_are_written_out(family: Callable[..., Teacher]) -> None:
    teacher = family("ace_step", num_hidden_layers=6)
    assert not teacher.files.config.get("layer_types")
    config = shorten(teacher, [0, 1, 2, 5]).config
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert shorten(teacher, [0, 2, 4]).config["layer_types"] == ["sliding_attention"] * 3


def test_what_ace_step_lists_of_blocks_goes_with_them(family: Callable[..., Teacher]) -> None:
    turns = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    teacher = family("ace_step", num_hidden_layers=4, layer_types=turns)
    assert shorten(teacher, [0, 2, 3]).config["layer_types"] == [turns[0], *turns[2:]]


@pytest.mark.parametrize(("gone", "layers"), [({1}, [0, 1]), ({3}, [0, 2]), ({4}, [0, 2]), ({1, 3, 4}, [0, 1])])
def test_vaces_hints_move_along(family: Callable[..., Teacher], gone: set[int], layers: list[int]) -> None:
    teacher = family("wan_vace", num_layers=5, vace_layers=[0, 2])
    kept = [block.index for block in teacher.blocks if block.list_name != "blocks" or block.position not in gone]
    shorter = shorten(teacher, kept)
    assert shorter.config == teacher.files.config | {"num_layers": 5 - len(gone), "vace_layers": layers}
    control = {name for name in shorter.origins if name.startswith("vace_blocks.")}
    assert control
    assert all(shorter.origins[name] == name for name in control), "no control block is lost"


def test_a_list_that_did_not_run_loses_blocks_with_the_one_that_did(family: Callable[..., Teacher]) -> None:
    """Z-Image's refiners have one key for their length; refiners of the picture and of the caption go together."""
    teacher = family("z_image", n_layers=4, n_refiner_layers=3)
    names = [block.list_name for block in teacher.blocks]
    kept = [block.index for block in teacher.blocks if block.list_name == "layers" or block.position != 1]
    config = shorten(teacher, kept).config
    assert config == teacher.files.config | {"n_refiner_layers": 2}
    with pytest.raises(UserError, match="'n_refiner_layers' is the length of"):
        shorten(teacher, [index for index in range(len(names)) if index != names.index("noise_refiner") + 1])
