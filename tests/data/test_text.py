"""Encoded captions: what is stored is read again, and how captions are joined is learned from how they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppcl_ds.data.text import Joining, from_stored, leaves, mapped, to_stored

# Stored and read


def same(own: Any, other: Any) -> bool:
    """Whether two trees are of the same kinds, tensors of the same values."""
    if type(own) is not type(other):
        return False
    if isinstance(own, Tensor):
        return own.dtype == other.dtype and torch.equal(own, other)
    if isinstance(own, dict):
        return list(own) == list(other) and all(same(own[key], other[key]) for key in own)
    if isinstance(own, (list, tuple)):
        return len(own) == len(other) and all(map(same, own, other))
    return own == other


def filled(shape: list[int], kind: str, seed: int, zeros: int) -> Tensor:
    """Numbers that bfloat16 holds, with so many zeros at the end of dimension 1."""
    numbers = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1:
        numbers[:, shape[1] - min(zeros, shape[1]) :] = 0
    return {"float": numbers.float(), "whole": numbers, "mask": numbers > 0}[kind]


tensors = st.builds(
    filled,
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["float", "whole", "mask"]),
    st.integers(0, 99),
    st.integers(0, 4),
)
trees = st.recursive(
    tensors | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["length", "tensor", "value"]), inside, max_size=3)
    ),
    max_leaves=6,
)


@given(tree=trees)
def test_a_tree_comes_back(tree: Any) -> None:
    stored, word = to_stored(tree, "text.0")
    assert all(name.startswith("text.0.") for name in stored)
    assert same(from_stored(stored, word), tree)


def test_a_tree_comes_back_from_a_file_though_a_tensor_stands_in_two_places(tmp_path: Path) -> None:
    embeds, ids = torch.ones(1, 3, 4).bfloat16(), torch.zeros(3, 3, dtype=torch.long)
    tree = (embeds, None, {"ids": ids, "both": [embeds, ids, embeds[:, :2]]})
    stored, word = to_stored(tree, "text")
    save_file(stored, tmp_path / "text.safetensors")
    read = from_stored(load_file(tmp_path / "text.safetensors"), word)
    assert same(read, mapped(tree, lambda _, leaf: leaf.float() if leaf is not None and leaf is not ids else leaf))


def test_floats_are_rounded_to_bfloat16_and_read_as_float32() -> None:
    tensor = torch.tensor([[1.001, 3.14159]], dtype=torch.float64)
    read = from_stored(*to_stored(tensor, "text"))
    assert read.dtype == torch.float32
    assert torch.equal(read, tensor.bfloat16().float())


def test_zeros_at_the_end_are_left_out_and_put_back() -> None:
    embeds = torch.zeros(1, 512, 4)
    embeds[:, :3] = 1
    embeds[:, 1] = 0  # zeros in the midst stay
    stored, word = to_stored([embeds, torch.zeros(1, 512, 4), torch.ones(1, 512, 4)], "text")
    assert [tensor.shape[1] for tensor in stored.values()] == [3, 1, 512]
    read = from_stored(stored, word)
    assert torch.equal(read[0], embeds)
    assert [tensor.shape[1] for tensor in read] == [512] * 3


@pytest.mark.parametrize("tensor", [torch.zeros(1, 8), torch.zeros(1, 8, 2, dtype=torch.long), torch.zeros(4)])
def test_zeros_of_pooled_tensors_masks_and_ids_are_kept(tensor: Tensor) -> None:
    stored, _ = to_stored(tensor, "text")
    assert [each.shape for each in stored.values()] == [tensor.shape]


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(ValueError, match="a dtype in what encode_prompt returned"):
        to_stored([torch.float32], "text")


@pytest.mark.parametrize(
    "word",
    [
        "",
        "nonsense",
        "null",
        "3",
        "[]",
        "{}",
        '{"length": 2}',
        '{"tensor": "text.9", "length": 0}',
        '{"tensor": ["text.0"], "length": 0}',
        '{"tensor": "text.0"}',
        '{"tensor": "text.0", "length": "many"}',
        '{"tensor": "text.0", "length": 4000000000000000000}',
        '{"list": 3}',
        '{"tuple": {"a": 1}}',
        '{"dict": [1]}',
        '{"list": [{"value": 1}, 2]}',
        '{"list": [], "dict": {}}',
        '{"set": [1]}',
    ],
)
def test_a_damaged_word_is_told_of(word: str) -> None:
    with pytest.raises(ValueError, match="its text cannot be put together"):
        from_stored({"text.0": torch.ones(1, 2, 3)}, word)


@given(data=st.data())
def test_a_word_cut_anywhere_is_told_of(data: st.DataObject) -> None:
    stored, word = to_stored([torch.ones(1, 2, 3), {"a": None}], "text")
    with pytest.raises(ValueError, match="its text cannot be put together"):
        from_stored(stored, word[: data.draw(st.integers(0, len(word) - 1))])


def test_leaves_and_where_they_are() -> None:
    tree = {"a": (1, [None, "x"]), "b": 2.5}
    assert dict(leaves(tree)) == {("a", 0): 1, ("a", 1, 0): None, ("a", 1, 1): "x", ("b",): 2.5}
    assert mapped(tree, lambda path, leaf: (len(path), leaf)) == {"a": ((2, 1), [(3, None), (3, "x")]), "b": (1, 2.5)}
    assert dict(leaves(tree, whole=[("a", 1)]))["a", 1] == [None, "x"]


# Joined

SHORT, LONG, MIDDLE = 3, 7, 5
WIDTH = 4


def words(length: int) -> Tensor:
    """(S, C), other numbers for every caption."""
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))


def grown(rows: list[Tensor], by: float = 0.0) -> Tensor:
    """(B, S, ...): captions one after the other, the shorter ones filled up."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=by)


def padded(*lengths: int) -> Any:
    """An encoder with zeros behind the shorter captions, and a mask."""
    return grown([words(length) for length in lengths]), grown([torch.ones(n, dtype=torch.long) for n in lengths])


def pooled(*lengths: int) -> Any:
    """One vector a caption, a fixed number of tokens, and nothing for a second encoder."""
    vectors = torch.stack([words(length).mean(0) for length in lengths])
    return {"pooled": vectors, "tokens": torch.stack([words(9) + n for n in lengths]), "second": None}


def layered(*lengths: int) -> Any:
    """HiDream's: (L, B, S, C), a tensor of all layers of the encoder, padded to the same length."""
    return [torch.stack([torch.stack([words(9) * n + layer for n in lengths]) for layer in range(3)])]


def one_layer(*lengths: int) -> Any:
    """The same with L = 1 and captions of their own length."""
    return grown([words(length) for length in lengths])[None]


def with_ids(*lengths: int) -> Any:
    """FLUX's: ids of tokens (S, 3) without a dimension of captions, as many as the longest has."""
    return grown([words(length) for length in lengths]), torch.zeros(max(lengths), 3)


def with_the_same_ids(*lengths: int) -> Any:
    """Ids (1, S, 3) that are the same whatever the captions are."""
    return torch.stack([words(9) + n for n in lengths]), torch.arange(27.0).reshape(1, 9, 3)


def listed(*lengths: int) -> Any:
    """Z-Image's: a list with a tensor (S, C) a caption, and none without a prompt."""
    return [words(length) for length in lengths], []


def masked_if_padded(*lengths: int) -> Any:
    """Qwen-Image's: a mask only where there is padding."""
    mask = None if len(set(lengths)) == 1 else grown([torch.ones(n, dtype=torch.bool) for n in lengths])
    return grown([words(length) for length in lengths]), mask


def counted(*lengths: int) -> Any:
    """Lengths as numbers, a list with one a caption."""
    return grown([words(length) for length in lengths]), {"lengths": list(lengths)}


def one_of_layers(*lengths: int) -> Any:
    """A list with a tensor a layer of the encoder: no list of captions."""
    return [grown([words(length) + layer for length in lengths]) for layer in range(2)]


ENCODERS = [
    padded,
    pooled,
    layered,
    one_layer,
    with_ids,
    with_the_same_ids,
    listed,
    masked_if_padded,
    counted,
    one_of_layers,
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("encode", ENCODERS)
def test_captions_joined_are_what_they_are_encoded_together(encode: Any, turned: bool) -> None:
    """Learned from two captions, and right for three others, in any order."""
    first, second = (LONG, SHORT) if turned else (SHORT, LONG)
    joining = Joining.learn(encode(first), encode(second), encode(first, second))
    assert joining.padded
    others = [MIDDLE, 2, 6]
    assert same(joining([encode(length) for length in others]), encode(*others))
    assert same(joining([encode(MIDDLE)]), encode(MIDDLE))


def test_where_captions_and_tokens_are() -> None:
    def learned(encode: Any) -> Joining:
        return Joining.learn(encode(SHORT), encode(LONG), encode(SHORT, LONG))

    assert learned(padded) == Joining({(0,): 0, (1,): 0}, {(0,): 1, (1,): 1}, True)
    assert learned(pooled) == Joining({("pooled",): 0, ("tokens",): 0}, {}, True)
    assert learned(layered) == Joining({(0,): 1}, {}, True)
    assert learned(one_layer) == Joining({(): 1}, {(): 2}, True)
    assert learned(with_ids) == Joining({(0,): 0}, {(0,): 1, (1,): 0}, True)
    assert learned(listed) == Joining({}, {}, True, frozenset({(0,)}))


def test_captions_of_one_length_need_no_mask() -> None:
    joining = Joining.learn(masked_if_padded(SHORT), masked_if_padded(LONG), masked_if_padded(SHORT, LONG))
    assert joining.masks == {(1,): ((0,), torch.bool)}
    texts = [masked_if_padded(MIDDLE), masked_if_padded(MIDDLE)]
    assert joining(texts)[1] is None
    assert [mask for _, mask in joining.lengthened(texts)] == [None, None]
    (_, one), (_, other) = joining.lengthened([masked_if_padded(2), masked_if_padded(MIDDLE)])
    assert torch.equal(torch.cat([one, other]), masked_if_padded(2, MIDDLE)[1])


def test_padding_that_is_not_zeros_is_noticed() -> None:
    def encode(*lengths: int) -> Any:
        return (grown([words(length) for length in lengths], by=0.5),)

    joining = Joining.learn(encode(SHORT), encode(LONG), encode(SHORT, LONG))
    assert not joining.padded
    assert joining.batch == {(0,): 0}
    assert same(joining([encode(SHORT), encode(SHORT)]), encode(SHORT, SHORT)), "captions of one length are joined"


def test_captions_that_change_each_other_are_noticed() -> None:
    def encode(*lengths: int) -> Any:
        return [words(length) * len(lengths) for length in lengths], torch.ones(len(lengths), 2)

    assert not Joining.learn(encode(SHORT), encode(LONG), encode(SHORT, LONG)).padded


def test_lengthened_captions_are_as_long_as_the_longest() -> None:
    joining = Joining.learn(padded(SHORT), padded(LONG), padded(SHORT, LONG))
    texts = joining.lengthened([padded(2), padded(MIDDLE)])
    whole = padded(2, MIDDLE)
    assert same(texts, [tuple(part[place : place + 1] for part in whole) for place in range(2)])


@pytest.mark.parametrize(
    "encode",
    [
        lambda *lengths: [torch.cat([words(n) for n in lengths])],  # (S of all captions, C)
        lambda *lengths: words(sum(lengths))[None],
        lambda *lengths: tuple(words(n)[None] for n in lengths),
        lambda *lengths: torch.ones(lengths[0], lengths[-1]),
        lambda *lengths: words(SHORT)[None] if len(lengths) > 1 or lengths[0] == SHORT else words(LONG),
        lambda *lengths: [words(SHORT) if len(lengths) > 1 else None],
        lambda *lengths: (words(lengths[-1])[None], torch.ones(2, lengths[-1]) if len(lengths) > 1 else None),
    ],
    ids=["end to end", "end to end with B", "a tuple", "two lengths", "other dimensions", "none alone", "no mask"],
)
def test_what_is_put_together_in_another_way_is_refused(encode: Any) -> None:
    with pytest.raises(ValueError, match=r"become one of|no mask of tokens|another number of tensors"):
        Joining.learn(encode(SHORT), encode(LONG), encode(SHORT, LONG))


def test_stored_captions_join_like_fresh_ones() -> None:
    short, long = (from_stored(*to_stored(padded(length), "text")) for length in (SHORT, LONG))
    joined = Joining.learn(short, long, padded(SHORT, LONG))([short, long])
    assert torch.allclose(joined[0], padded(SHORT, LONG)[0], rtol=1e-2, atol=1e-3)
    assert json.loads(to_stored(joined, "text")[1]).keys() == {"tuple"}
