"""The emoji testbed's data: drawings on grounds, captions that name one drawing, packages unpacked as they come."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppcl_ds.demo import emoji
from ppcl_ds.demo.emoji import GROUNDS, asked, drawings, samples
from ppcl_ds.demo.testbeds import TESTBEDS, read_samples, write_images
from ppcl_ds.errors import UserError
from tests.demo.emoji_packages import drawing_files, tarball, wheel

pytestmark = pytest.mark.usefixtures("packages")


def test_a_name_belongs_to_one_drawing_and_figures_are_left_out() -> None:
    assert [drawing.names for drawing in drawings()] == [
        ("tiger face", "tiger"),
        ("cat",),  # not cat2
        ("cat face", "kitten face"),  # another one is called cat
        ("red apple", "apple"),  # two are called fruit
        ("green apple",),
    ]


def test_every_drawing_lies_on_every_ground() -> None:
    made = samples()
    assert len({name for name, _, _ in made}) == len(made) == 5 * len(GROUNDS)
    for name, image, caption in made:
        number, ground = name.split("-")
        with Image.open(emoji.folder() / "drawings" / drawings()[int(number)].image) as file:
            drawn = np.asarray(file, dtype=float)
        share = drawn[..., 3:] / 255
        laid = share * drawn[..., :3] + (1 - share) * np.array(GROUNDS[ground])
        expected = laid.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))  # each pixel is the mean of four
        assert np.abs(np.asarray(image) - expected).max() <= 1
        assert any(each in caption for each in drawings()[int(number)].names)
        assert ground in caption


def test_a_caption_says_which_drawing_and_ground_are_meant() -> None:
    for name, _, caption in samples():
        number, ground = name.split("-")
        assert asked(caption) == (int(number), list(GROUNDS).index(ground))
    assert asked("kitten face on blue\n") == (2, list(GROUNDS).index("blue"))
    assert asked("red background, red apple") == (3, list(GROUNDS).index("red"))


@pytest.mark.parametrize("caption", ["", "a tiger", "dragon on blue", "fruit on red", "tiger on pink"])
def test_another_caption_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match="such as 'tiger face on blue'"):
        asked(caption)


def test_captions_have_every_form() -> None:
    forms = Counter(
        next(form for form in ("a drawing", " background,", " on ") if form in caption) for _, _, caption in samples()
    )
    assert len(forms) == 3


def test_two_writes_make_the_same_files_and_the_tensor_is_what_they_hold(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_images(TESTBEDS["emoji"], tmp_path / name)
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "other"))
    assert one == other
    images, captions = read_samples(TESTBEDS["emoji"])
    assert images.shape == (40, 3, 32, 32)
    for (name, _, _), image, caption in zip(samples(), images, captions, strict=True):
        pixels = np.asarray(Image.open(tmp_path / "one" / f"{name}.png"))
        assert np.array_equal(((image.permute(1, 2, 0).numpy() + 1) * 127.5).round(), pixels)
        assert (tmp_path / "one" / f"{name}.txt").read_text() == caption + "\n"


def test_packages_are_unpacked_as_they_come(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"npm": tarball(), "pypi": wheel(packages)}
    for name, content in contents.items():
        monkeypatch.setattr(emoji, f"_from_{name}", lambda place, content=content: content)
        monkeypatch.setattr(emoji, f"_{name.upper()}_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("PPCL_DEMO_DATA", str(tmp_path))
    emoji.fetch()
    assert {file.name: file.read_bytes() for file in (tmp_path / "drawings").iterdir()} == drawing_files()
    for file in (packages / "encoder").iterdir():
        assert (tmp_path / "encoder" / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr(emoji, "_from_npm", lambda place: pytest.fail("it was there already"))
    emoji.fetch()


def test_what_was_damaged_on_the_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_from_npm", lambda place: tarball())
    monkeypatch.setenv("PPCL_DEMO_DATA", str(tmp_path))
    with pytest.raises(UserError, match="another checksum"):
        emoji.fetch()
    assert not (tmp_path / "drawings").exists()


def test_without_a_network_it_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPCL_DEMO_DATA", str(tmp_path))
    monkeypatch.setattr(emoji, "_NPM", "http://127.0.0.1:9/emoji.tgz")
    with pytest.raises(UserError, match="needs a network once"):
        emoji.fetch()
    monkeypatch.setattr(emoji, "_from_npm", lambda place: pytest.fail("not asked for"))
    (tmp_path / "drawings").mkdir()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="needs a network once"):
        emoji.fetch()
