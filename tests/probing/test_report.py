"""The probe report: the paper's rule on matrices drawn by hand, and files that come back as they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppcl_ds.errors import UserError
from ppcl_ds.probing.heatmaps import PLOTS, by_length, save_report
from ppcl_ds.probing.measure import MATRICES, Measured
from ppcl_ds.probing.report import Matrix, ProbeReport, load_report, make_report, ppcl_spans


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


def test_a_span_ends_with_what_was_measured() -> None:
    cka = matrix({0: falling([0.1, 0.05]), 3: falling([0.1, 0.1])}, 8)
    cka[6][6:] = [1.0, None]
    assert ppcl_spans(cka, [range(8)]) == [(0, 2), (3, 5)]


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


def halves(rows: Sequence[Mapping[int, Sequence[float]]], size: int) -> Measured:
    """What two halves of the samples said of a teacher with one stream; all matrices alike."""
    values = np.array([matrix(half, size) for half in rows], dtype=float)
    found: Measured = {(name, "image"): values for name in MATRICES}
    return found | {
        ("influence", "image"): np.array([[0.1] * size, [0.3] * size]),
        ("tokens", "image"): np.array([[40.0] * size, [60.0] * size]),
    }


def test_figures_are_means_over_halves_and_streams_with_their_spread() -> None:
    measured = halves([{0: [1, 0.8, 0.6], 1: [1, 0.9], 2: [1]}, {0: [1, 0.6, 0.6], 1: [1, 0.9], 2: [1]}], 3)
    text = np.full((2, 3, 3), np.nan)
    text[:, 0, 1] = 0.1  # leaves the last block unread: the average there is the image's alone
    measured |= {(name, "text"): text for name in MATRICES}
    measured |= {(name, "text"): values[:, :] for (name, _), values in measured.items() if values.ndim == 2}
    report = make_report(measured, "Some", ["text"], [range(3)])
    assert report.figures["image"]["cka"].value[0][1:] == pytest.approx([0.7, 0.6])
    assert report.figures["image"]["cka"].spread[0][1:] == pytest.approx([0.1, 0])
    assert report.cka[0][1:] == pytest.approx([0.4, 0.6])
    assert report.figures["text"]["cka"].value[0][2] is None
    assert report.figures["mean"]["influence"].value == [pytest.approx([0.2] * 3)]
    assert report.figures["mean"]["influence"].spread == [pytest.approx([0.1] * 3)]
    assert report.tokens == {"image": 100, "text": 100}


def test_a_span_that_either_half_would_end_elsewhere_is_marked() -> None:
    others = {u: falling([0.1]) for u in (1, 2, 4, 5)}
    same = others | {3: falling([0.1, 0.05, 0.2, 0.1]), 6: falling([0.1])}
    one = {0: falling([0.1, 0.05, 0.15]), **same}
    other = {0: falling([0.1, 0.11, 0.05]), **same}
    report = make_report(halves([one, other], 8), "Some", [], [range(8)])
    assert report.spans == [(0, 2), (3, 5), (6, 7)]
    assert report.unstable == [(0, 2)]
    assert make_report(halves([one, one], 8), "Some", [], [range(8)]).unstable == []


def full_example() -> ProbeReport:
    one = {u: falling([0.1, 0.05, 0.2, 0.1, 0.1][u:]) for u in range(6)}
    other = {u: falling([0.1, 0.12, 0.2, 0.1, 0.05][u:]) for u in range(6)}
    return make_report(halves([one, other], 6), "Some", ["text"], [range(6)])


def test_every_figure_is_a_picture_too(tmp_path: Path) -> None:
    save_report(full_example(), tmp_path)
    assert all((tmp_path / f"{picture.name}.png").stat().st_size > 1000 for picture in PLOTS)
    assert load_report(tmp_path) == full_example()


def test_maps_have_a_row_a_length() -> None:
    rows = by_length(matrix({0: [1, 0.9, 0.8], 1: [1, 0.7], 2: [1, 0.6], 3: [1]}, 4))
    assert rows == [[1, 1, 1, 1], [0.9, 0.7, 0.6, None], [0.8, None, None, None]]


def test_tensorboard_shows_the_pictures_of_the_last_report_alone(tmp_path: Path) -> None:
    for _ in range(2):
        save_report(full_example(), tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"probe/heatmap", *(f"probe/{picture.name}" for picture in PLOTS)}


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
    save_report(example(), tmp_path / "new" / "probe")
    assert load_report(tmp_path / "new" / "probe") == example()


def test_the_heatmap_is_a_picture_one_can_read(tmp_path: Path) -> None:
    save_report(example(), tmp_path)
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
    save_report(example(), tmp_path)
    (tmp_path / "report.json").write_text(damage)
    with pytest.raises(UserError, match="ppcl probe") as refused:
        load_report(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_report_is_made_of_figures_that_are_not_finite() -> None:
    rows = {0: falling([0.1, 0.05]), 1: [1.0, float("nan")]}
    with pytest.raises(UserError, match="block 2 are not finite"):
        make_report(halves([rows, rows], 3), "Some", [], [range(3)])
