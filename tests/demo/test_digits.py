"""The demo's data: pictures that hold the real digits exactly, captions that name them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ppcl_ds.demo.digits import WORDS, digit_in, real_digits
from ppcl_ds.demo.testbeds import TESTBEDS, write_images
from ppcl_ds.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "images"
    write_images(TESTBEDS["digits"], path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_real_digit_can_be_read_back_exactly(folder: Path) -> None:
    pictures = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    assert {(picture.mode, picture.size) for picture in pictures} == {("L", (8, 8))}
    greys = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(np.rint(greys / 255 * 16), load_digits().images)


def test_every_caption_and_every_name_says_the_right_digit(folder: Path) -> None:
    captions = [path.read_text().strip() for path in sorted(folder.glob("*.txt"))]
    assert [digit_in(caption) for caption in captions] == load_digits().target.tolist()
    words = [path.stem.split("-")[1] for path in sorted(folder.glob("*.png"))]
    assert [WORDS.index(word) for word in words] == load_digits().target.tolist()


def test_captions_have_different_lengths_and_each_is_common(folder: Path) -> None:
    lengths = Counter(len(path.read_text().split()) for path in folder.glob("*.txt"))
    assert sorted(lengths) == [1, 3, 6]
    assert min(lengths.values()) > 300


def test_two_writes_make_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_images(TESTBEDS["digits"], tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_a_complete_folder_is_left_alone_and_a_cut_off_one_is_completed(tmp_path: Path) -> None:
    write_images(TESTBEDS["digits"], tmp_path)
    whole = contents(tmp_path)
    kept, lost = sorted(tmp_path.glob("*.txt"))[:2]
    stamp = kept.with_suffix(".png").stat().st_mtime_ns
    lost.unlink()
    lost.with_suffix(".png").write_bytes(b"cut off")
    write_images(TESTBEDS["digits"], tmp_path)
    assert contents(tmp_path) == whole
    assert kept.with_suffix(".png").stat().st_mtime_ns == stamp


def test_real_digits_span_minus_one_to_one() -> None:
    pictures, labels = real_digits()
    assert pictures.shape == (1797, 64)
    assert (pictures.min(), pictures.max()) == (-1.0, 1.0)
    assert sorted(set(labels.tolist())) == list(range(10))


@pytest.mark.parametrize("caption", ["", "a handwritten letter", "seven or eight"])
def test_a_caption_without_exactly_one_digit_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match="one digit"):
        digit_in(caption)
