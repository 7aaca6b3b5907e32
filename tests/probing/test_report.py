"""The probe report: the paper's rule on matrices drawn by hand, and files that come back as they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ppcl_ds.errors import UserError
from ppcl_ds.probing.report import Matrix, ProbeReport, load_report, ppcl_spans


def matrix(rows: Mapping[int, Sequence[float]], size: int) -> Matrix:
    """`rows[u]` are cka(u, u), cka(u, u + 1), ...; rows that a rule must not look at are left out."""
    filled: Matrix = [[None] * size for _ in range(size)]
    for u, values in rows.items():
        filled[u][u : u + len(values)] = values
    return filled


def falling(losses: Sequence[float]) -> list[float]:
    """Similarities from 1 downwards, losing so much at each block."""
    return [1 - sum(losses[:count]) for count in range(len(losses) + 1)]


def test_a_span_ends_before_the_block_where_the_loss_accelerates() -> None:
    # From block 0 the loss slows down up to block 3 and is larger again at block 4: the span is [0, 3].
    # From block 4 it is larger at once, at block 6: the shortest span is [4, 5]. From block 6 one step is left.
    cka = matrix({0: falling([0.1, 0.05, 0.02, 0.09, 0.01, 0.01, 0.0]), 4: falling([0.1, 0.2, 0.1]), 6: [1, 0.5]}, 8)
    assert ppcl_spans(cka, [range(8)]) == [(0, 3), (4, 5), (6, 7)]


def test_a_loss_that_slows_down_runs_to_the_end() -> None:
    assert ppcl_spans(matrix({0: falling([0.1, 0.08, 0.05, 0.01])}, 5), [range(5)]) == [(0, 4)]


@pytest.mark.parametrize("loss", [0.0, 0.125, 0.1, 0.07])
def test_a_linear_loss_runs_to_the_end(loss: float) -> None:
    row = [1 - loss * count for count in range(7)]
    assert ppcl_spans(matrix({0: row}, 7), [range(7)]) == [(0, 6)]


def test_a_block_that_is_left_over_at_the_end_has_no_span() -> None:
    cka = matrix({0: falling([0.1, 0.05, 0.2])}, 4)
    assert ppcl_spans(cka, [range(4)]) == [(0, 2)]
    assert ppcl_spans(matrix({}, 1), [range(1)]) == []


def test_no_span_crosses_lists() -> None:
    cka = matrix({0: falling([0.1, 0.05, 0.01]), 4: falling([0.1, 0.1, 0.3]), 7: [1]}, 8)
    assert ppcl_spans(cka, [range(4), range(4, 8)]) == [(0, 3), (4, 6)]
    short = matrix({0: [1], 1: falling([0.2, 0.1])}, 4)
    assert ppcl_spans(short, [range(1), range(1, 4)]) == [(1, 3)]


@given(st.data())
def test_the_rule_holds_on_any_matrix(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    loss = st.integers(0, 8).map(lambda eighths: eighths / 64)  # exact in binary, so that equal losses are equal
    rows = {u: falling(data.draw(st.lists(loss, min_size=size - 1 - u, max_size=size - 1 - u))) for u in range(size)}
    cut = data.draw(st.integers(1, size))
    lists = [blocks for blocks in (range(cut), range(cut, size)) if blocks]

    expected = []
    for blocks in lists:
        u = blocks[0]
        while u < blocks[-1]:
            k = u + 2
            while k <= blocks[-1] and rows[u][k - u - 1] - rows[u][k - u] <= rows[u][k - u - 2] - rows[u][k - u - 1]:
                k += 1
            expected.append((u, k - 1))
            u = k
    assert ppcl_spans(matrix(rows, size), lists) == expected


def example() -> ProbeReport:
    cka = matrix({u: falling([0.1 / 3] * (4 - u)) for u in range(5)}, 5)
    error = matrix({u: [0.5, *[0.1 / 7] * (4 - u)] for u in range(5)}, 5)
    for u in range(5):
        error[u][u] = None
    error[0][1] = 0.0  # its logarithm must not break the picture
    return ProbeReport(
        teacher="QwenImageTransformer2DModel",
        tokens={"image": 1000, "text": 77},
        cka=cka,
        error=error,
        spans=[(0, 1), (2, 4)],
        unused=["text"],
    )


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    example().save(tmp_path / "new" / "probe")
    assert load_report(tmp_path / "new" / "probe") == example()


def test_the_heatmap_is_a_picture_one_can_read(tmp_path: Path) -> None:
    example().save(tmp_path)
    with Image.open(tmp_path / "heatmap.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 800 <= picture.width <= 3000
        assert 300 <= picture.height <= 1500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_missing_report_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ppcl probe") as refused:
        load_report(tmp_path / "probe")
    assert str(tmp_path / "probe") in str(refused.value)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", '{"teacher": 3}'])
def test_a_damaged_report_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    example().save(tmp_path)
    (tmp_path / "report.json").write_text(damage)
    with pytest.raises(UserError, match="ppcl probe") as refused:
        load_report(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
