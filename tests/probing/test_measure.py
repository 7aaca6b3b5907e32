"""Every figure of a real teacher against the same figure computed from stored activations."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
import numpy as np
import pytest
import torch

from ppcl_ds.probing import sums as sums_module
from ppcl_ds.probing.measure import Measured, measure, together
from ppcl_ds.probing.sums import Lane, add_capture, lanes_of, ranges, wanted_for, zero_sums
from ppcl_ds.teacher.anatomy import Anatomy
from tests.anatomies import anatomy_of
from tests.conftest import TEACHERS
from tests.probing.reference import (
    Activations,
    Readings,
    follow,
    influence,
    kernel_cka,
    minibatch_cka,
    read,
    ridge_probe,
)

CPU = torch.device("cpu")
RIDGE = 1e-4
LISTS = {"qwen": [range(6)], "flux": [range(4), range(4, 9)], "sd3": [range(6)]}


def teacher(family: str) -> torch.nn.Module:
    class_name, config = TEACHERS[family]
    torch.manual_seed(0)
    return getattr(diffusers, class_name)(**config).eval()


def measured(
    anatomy: Anatomy,
    readings: Readings,
    lanes: Sequence[Lane],
    max_span: int = 8,
    at_once: int | None = None,
    ranks: int = 1,
) -> Measured:
    """What the program finds, each of some ranks measuring its own rows."""

    def one(rank: int) -> Measured:
        def passes():  # type: ignore[no-untyped-def]
            for blocks in ranges(lanes, max_span, at_once, 1 << 40):
                found = zero_sums(lanes, blocks, max_span, CPU)
                for number, capture, mask in readings:
                    add_capture(found, lanes, blocks, anatomy, number, capture, mask)
                yield found

        return measure(lanes, passes(), len(anatomy), RIDGE, lambda block: block % ranks == rank)

    return together([one(rank) for rank in range(ranks)])


def place(activations: Activations, key: tuple[int, str], half: int, side: int) -> list[np.ndarray]:
    """Tokens entering (0) or leaving (1) a block, micro-batch by micro-batch, of one half of the samples."""
    return [pair[side] for pair in activations[key]][half::2]


@pytest.mark.parametrize(("family", "unused"), [("qwen", ["text"]), ("flux", []), ("sd3", [])])
def test_figures_are_those_of_stored_activations_and_held_out_chains(family: str, unused: list[str]) -> None:
    model = teacher(family)
    anatomy = anatomy_of(model)
    readings, activations = read(model, range(6))
    lanes = lanes_of(anatomy, readings[0][1], unused)
    found = measured(anatomy, readings, lanes)
    size = len(anatomy)
    last_text = size - 1 if family in ("qwen", "sd3") else size
    for stream in ("image", "text"):
        for half in range(2):
            probes = {
                block: ridge_probe(
                    np.concatenate(place(activations, (block, stream), 1 - half, 0)),
                    np.concatenate(place(activations, (block, stream), 1 - half, 1)),
                    RIDGE,
                )
                for block in range(size if stream == "image" else last_text)
            }
            for u in range(size):
                if stream == "text" and u >= last_text:
                    assert np.isnan(found["influence", stream][half, u])
                    assert np.isnan(found["cka", stream][half, u]).all()
                    continue
                before, after = (np.concatenate(place(activations, (u, stream), half, side)) for side in (0, 1))
                assert found["tokens", stream][half, u] == len(before)
                assert found["influence", stream][half, u] == pytest.approx(influence(before, after), abs=1e-9)
                expect_row(found, activations, probes, (u, stream), half, LISTS[family], last_text)


def expect_row(
    found: Measured,
    activations: Activations,
    probes: dict[int, np.ndarray],
    key: tuple[int, str],
    half: int,
    lists: Sequence[range],
    last_text: int,
) -> None:
    u, stream = key
    [blocks] = [blocks for blocks in lists if u in blocks]
    own = place(activations, key, half, 1)
    chain = own
    for v in range(len(found["cka", stream][half])):
        figures = {name: found[name, stream][half, u, v] for name in ("cka", "cka_true", "error")}
        if v <= u or v not in blocks or (stream == "text" and v >= last_text):
            assert [np.isnan(figure) for figure in figures.values()] == [u != v, u != v, True]
            continue
        chain = [follow(probes[v], tokens) for tokens in chain]
        true = place(activations, (v, stream), half, 1)
        ours, start, end = (np.concatenate(tokens) for tokens in (chain, own, true))
        assert figures["error"] == pytest.approx(np.square(ours - end).sum() / np.square(end).sum(), rel=1e-6)
        assert figures["cka"] == pytest.approx(kernel_cka(start, ours), abs=1e-7)
        assert figures["cka_true"] == pytest.approx(kernel_cka(end, ours), abs=1e-7)
        drawn = [
            torch.randperm(len(tokens), generator=torch.Generator().manual_seed(number))[: sums_module.SAMPLED].numpy()
            for number, tokens in zip(range(half, 99, 2), own, strict=False)
        ]
        for name, other in (("cka_unbiased", own), ("cka_true_unbiased", true)):
            pairs = [(a[rows], b[rows]) for rows, a, b in zip(drawn, other, chain, strict=True)]
            assert found[name, stream][half, u, v] == pytest.approx(minibatch_cka(pairs), abs=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_ranges_of_blocks_and_rows_over_ranks_change_nothing(at_once: int) -> None:
    model = teacher("flux")
    anatomy = anatomy_of(model)
    readings, _ = read(model, range(3))
    lanes = lanes_of(anatomy, readings[0][1], [])
    whole, parts = (
        measured(anatomy, readings, lanes, 3),
        measured(anatomy, readings, lanes, 3, at_once=at_once, ranks=2),
    )
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        np.testing.assert_array_equal(values, parts[key], err_msg=str(key))


def test_a_shorter_longest_span_leaves_out_longer_ones_alone() -> None:
    model = teacher("qwen")
    anatomy = anatomy_of(model)
    readings, _ = read(model, range(2))
    lanes = lanes_of(anatomy, readings[0][1], ["text"])
    long, short = measured(anatomy, readings, lanes, 8), measured(anatomy, readings, lanes, 3)
    for name in ("cka", "error", "cka_true_unbiased"):
        for u in range(6):
            for v in range(6):
                left, right = long[name, "image"][:, u, v], short[name, "image"][:, u, v]
                np.testing.assert_array_equal(right, left if v - u < 3 else np.full(2, np.nan))


def test_a_forward_is_run_for_what_a_range_needs_alone() -> None:
    lanes = [Lane("image", 0, 9, 4), Lane("text", 0, 8, 4)]
    wanted = wanted_for(lanes, range(2, 4), 3)
    assert (wanted.calls, wanted.exits) == ({2}, {2, 3, 4, 5})
    assert wanted_for(lanes, range(6, 9), 5).exits == {6, 7, 8}


def test_ranges_fill_the_memory_that_there_is_and_no_more() -> None:
    lanes = [Lane("image", 0, 10, 64)]
    one = sums_module.block_bytes(lanes, 0, 2)
    found = ranges(lanes, 2, None, 3 * one)
    assert [len(r) for r in found] == [3, 3, 3, 1]  # the last block's window is shorter, but not by a whole block
    assert sorted(block for r in found for block in r) == list(range(10))
    assert found[0].stop == 10
    assert [len(r) for r in ranges(lanes, 2, None, 1)] == [1] * 10
    assert [len(r) for r in ranges(lanes, 2, 4, 1)] == [4, 4, 2]
    # With as much again for what leaves each block: of the first range alone, no window goes on behind it.
    assert [len(r) for r in ranges(lanes, 2, None, 4 * one, one)] == [2, 1, 1, 1, 1, 1, 1, 1, 1]


def test_a_block_that_is_affine_costs_nothing() -> None:
    model = teacher("qwen")
    for block in list(model.transformer_blocks)[2:5]:  # type: ignore[arg-type]
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    anatomy = anatomy_of(model)
    readings, _ = read(model, range(4))
    lanes = lanes_of(anatomy, readings[0][1], ["text"])
    found = measured(anatomy, readings, lanes)
    for stream in ("image", "text"):
        assert found["error", stream][:, 1, 4] == pytest.approx([0, 0], abs=1e-9)
        assert found["cka", stream][:, 1, 4] == pytest.approx([1, 1], abs=1e-9)
        assert found["influence", stream][:, 3] == pytest.approx([0, 0], abs=1e-9)
    assert (found["error", "image"][:, 1, 5] > 1e-6).all()
