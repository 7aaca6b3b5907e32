"""Promises of `ppcl-data shard` on a folder of images."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.shard import shard
from ppcl_ds.data.images import as_rgb, decode
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from tests.conftest import said
from tests.data.test_colours import by_hand, rgb_profile
from tests.data_tools.conftest import COUNT, Command, abandon, index_of, members, png, tree, write_recipe


def test_every_image_and_caption_is_stored_untouched_in_one_split(project: Path, ppcl_data: Command) -> None:
    out = ppcl_data("shard", project)
    raw = project / "shards" / "raw"
    train, heldout = members(raw, "train-*.tar"), members(raw, "heldout-*.tar")
    assert len(train) > len(heldout) > 0
    assert not train.keys() & heldout.keys()
    stored = train | heldout
    assert len(stored) == 2 * COUNT
    for image in (path for path in (project / "images").rglob("*") if path.suffix in {".png", ".JPG", ".webp"}):
        key = f"{image.parent.name}_{image.stem}".replace(" ", "_").replace(".", "_")
        assert stored[f"{key}{image.suffix.lower()}"] == image.read_bytes()
        assert stored[f"{key}.txt"] == image.with_suffix(".txt").read_bytes()
    assert f"{len(train) // 2} train samples" in out
    assert f"{COUNT} of {COUNT}" in out, "progress counts samples"


def test_samples_lie_in_the_order_of_the_hashes_of_their_keys(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    for split in ("train", "heldout"):
        keys = [name[:-4] for name in members(project / "shards" / "raw", f"{split}-*.tar") if name.endswith(".txt")]
        places = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
        assert places == sorted(places)
        assert all((place < 0.25 * 2**64) == (split == "heldout") for place in places)


def test_the_index_tells_the_truth_about_every_shard(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    for folder in (project / "shards" / "raw", project / "shards" / "encoded"):
        entries = index_of(folder)["shards"]
        assert sorted(entry["name"] for entry in entries) == sorted(path.name for path in folder.glob("*.tar"))
        for entry in entries:
            assert entry["sha256"] == hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest()
            assert entry["samples"] == len(entry["offsets"]) == len(members(folder, entry["name"])) / 2
            assert 1 <= entry["samples"] <= 8


def test_the_same_folder_gives_the_same_bytes_for_any_number_of_workers(project: Path, ppcl_data: Command) -> None:
    for name, workers in (("one", "1"), ("three", "3")):
        write_recipe(project, shards=str(project / name), samples_per_shard=3)
        ppcl_data("shard", project, "--workers", workers)
        ppcl_data("encode", project, "--workers", workers)
    journal = {".journal.jsonl"}  # in the order in which the workers were through
    assert tree(project / "one", journal) == tree(project / "three", journal)


@pytest.mark.parametrize("command", ["shard", "encode"])
def test_a_killed_run_goes_on_where_it_was(project: Path, ppcl_data: Command, command: str) -> None:
    write_recipe(project, samples_per_shard=3, heldout=0.0)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    expected = tree(project / "shards")
    write_recipe(project, samples_per_shard=3, heldout=0.0, shards=str(project / "again"))
    if command == "encode":
        ppcl_data("shard", project)
    # The program dies in the middle of its fourth shard, as a machine does.
    where = {
        "shard": ("data_tools.shard", "header_of", 11),
        "encode": ("ppcl_ds.teacher.encoding", "Encoder.latents", 11),
    }
    module, name, call = where[command]
    program = f"""
import functools, importlib, os, signal, sys
from data_tools import cli
owner = importlib.import_module({module!r})
*path, name = {name!r}.split(".")
for part in path:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), []
def deadly(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, deadly)
sys.argv = ["ppcl-data", {command!r}, {str(project / "recipe.yaml")!r}, "--workers", "1"]
cli.main()
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, timeout=60).returncode == -9
    final = project / "again" / ("raw" if command == "shard" else "encoded")
    assert not (final / "index.json").exists()
    work = project / "again" / "raw.partial" if command == "shard" else final
    written = {path: path.stat().st_mtime_ns for path in work.glob("*.tar")}
    assert len(written) == 3
    abandon(final)
    ppcl_data(command, project)
    ppcl_data("encode", project)
    assert {final / path.name: path_time(final / path.name) for path in written} == {
        final / path.name: time for path, time in written.items()
    }, "what was whole is not written again"
    again = tree(project / "again")
    assert again.keys() == expected.keys(), "nothing is left over"
    assert {n: v for n, v in again.items() if n.endswith(".tar")} == {
        n: v for n, v in expected.items() if n.endswith(".tar")
    }
    for name in ("raw", "encoded"):
        assert index_of(project / "again" / name) == index_of(project / "shards" / name)


def path_time(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_what_changed_between_a_kill_and_the_next_run_is_not_mixed(project: Path, ppcl_data: Command) -> None:
    partial = project / "shards" / "raw.partial"
    (project / "images" / "bad.png").write_bytes(b"")
    (project / "images" / "bad.txt").write_text("bad")
    write_recipe(project, max_bad_fraction=0.0, samples_per_shard=3)
    assert "1 of 31 samples" in ppcl_data.fail("shard", project)
    assert partial.is_dir()
    assert not (project / "shards" / "raw").exists()
    (project / "images" / "bad.png").unlink()
    caption = project / "images" / "part 0" / "000.v1.txt"
    caption.write_text("another")
    ppcl_data("shard", project)
    assert members(project / "shards" / "raw")["part_0_000_v1.txt"] == b"another"
    assert sorted(path.name for path in (project / "shards").iterdir()) == ["raw"]
    assert not [
        n
        for n in tree(project / "shards" / "raw")
        if not n.endswith((".tar", "index.json", ".journal.jsonl", ".source.json"))
    ]


@pytest.mark.parametrize("how", ["lost", "cut short"])
def test_only_a_lost_shard_is_made_again(project: Path, ppcl_data: Command, how: str) -> None:
    write_recipe(project, samples_per_shard=3)
    ppcl_data("shard", project)
    raw = project / "shards" / "raw"
    expected = tree(raw, {".journal.jsonl"})
    shard = raw / "train-000001.tar"
    others = {path: path_time(path) for path in raw.glob("*.tar") if path != shard}
    assert len(others) > 3
    if how == "lost":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    ppcl_data("shard", project)
    assert tree(raw, {".journal.jsonl"}) == expected
    assert {path: path_time(path) for path in others} == others
    assert sorted(path.name for path in (project / "shards").iterdir()) == ["raw"]


def test_a_shard_is_full_at_its_size_or_at_its_number_of_samples(tmp_path: Path, ppcl_data: Command) -> None:
    (tmp_path / "images").mkdir()
    for number in range(40):
        data = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(data).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("noise")
    write_recipe(tmp_path, heldout=0.0, samples_per_shard=1000, shard_size="60kB")
    ppcl_data("shard", tmp_path)
    entries = index_of(tmp_path / "shards" / "raw")["shards"]
    assert len(entries) > 3
    assert sum(entry["samples"] for entry in entries) == 40
    for entry in entries:
        # All but the padding at the end of a tar, which is a multiple of 10240 bytes.
        assert entry["size"] <= 60_000 + 10_240
    assert all(entry["size"] > 40_000 for entry in entries[:-1])
    write_recipe(tmp_path, heldout=0.0, samples_per_shard=7, shard_size="1GB")
    ppcl_data("shard", tmp_path)
    assert [e["samples"] for e in index_of(tmp_path / "shards" / "raw")["shards"]] == [7, 7, 7, 7, 7, 5]
    write_recipe(tmp_path, heldout=0.0, samples_per_shard=7, shard_size="1B")
    ppcl_data("shard", tmp_path)
    assert [e["samples"] for e in index_of(tmp_path / "shards" / "raw")["shards"]] == [1] * 40


def test_images_that_are_too_large_are_made_smaller_and_counted(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (100, 50), "red").save(images / "wide.jpg")
    Image.new("RGBA", (50, 200), (0, 255, 0, 128)).save(images / "tall.png")
    Image.new("P", (90, 90)).save(images / "palette.gif")
    Image.new("I;16", (64, 90)).save(images / "deep.png")
    Image.new("RGBA", (90, 64), (0, 0, 0, 0)).save(images / "clear.webp", lossless=True)
    (images / "small.png").write_bytes(png(1, (40, 30)))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (80, 20)).save(images / "turned.jpg", exif=turned)
    for image in list(images.iterdir()):
        image.with_suffix(".txt").write_text(image.stem)
    write_recipe(tmp_path, heldout=0.0, longest_side=40)
    out = ppcl_data("shard", tmp_path)
    assert "6 images made smaller" in out
    stored = members(tmp_path / "shards" / "raw")
    assert stored["small.png"] == (images / "small.png").read_bytes()
    pictures = {name: Image.open(BytesIO(data)) for name, data in stored.items() if not name.endswith(".txt")}
    assert {name: (image.format, image.size) for name, image in pictures.items()} == {
        "wide.jpg": ("JPEG", (40, 20)),
        "tall.png": ("PNG", (10, 40)),
        "palette.jpg": ("JPEG", (40, 40)),
        "deep.png": ("PNG", (28, 40)),
        "clear.jpg": ("JPEG", (40, 28)),
        "small.png": ("PNG", (40, 30)),
        "turned.jpg": ("JPEG", (10, 40)),
    }
    assert pictures["tall.png"].getpixel((5, 20)) == (0, 255, 0, 128)
    assert pictures["clear.jpg"].convert("L").getextrema() == (255, 255), "what was transparent is white"
    assert pictures["wide.jpg"].getpixel((5, 5)) in [(254, 0, 0), (255, 0, 0)]


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0XX\0*\0\0\0\x08\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing of the kind"]
)
def test_broken_exif_costs_its_own_image_at_most(tmp_path: Path, ppcl_data: Command, damage: bytes) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for kind in ("png", "jpg", "webp"):
        Image.new("RGB", (64, 64)).save(images / f"bad_{kind}.{kind}", exif=damage)
        Image.new("RGB", (64, 64)).save(images / f"good_{kind}.{kind}")
    for image in list(images.iterdir()):
        image.with_suffix(".txt").write_text(image.stem)
    write_recipe(tmp_path, heldout=0.0, longest_side=40, max_bad_fraction=0.6)
    ppcl_data("shard", tmp_path)
    stored = members(tmp_path / "shards" / "raw")
    assert {name.partition(".")[0] for name in stored} >= {f"good_{kind}" for kind in ("png", "jpg", "webp")}
    skipped = index_of(tmp_path / "shards" / "raw")["skipped"]
    assert len(stored) // 2 + len(skipped) == 6
    assert all("bad_" in line and "EXIF" in line for line in skipped)


@pytest.mark.parametrize("size", [(400, 1), (1, 400), (999, 3)])
def test_no_side_is_scaled_to_nothing(tmp_path: Path, ppcl_data: Command, size: tuple[int, int]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", size, "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a line")
    write_recipe(tmp_path, heldout=0.0, longest_side=40)
    ppcl_data("shard", tmp_path)
    stored = Image.open(BytesIO(members(tmp_path / "shards" / "raw")["a.png"]))
    assert sorted(stored.size) == [1, 40]
    assert stored.getpixel((0, 0)) == (255, 0, 0)


def test_an_image_that_was_made_smaller_keeps_its_colours(tmp_path: Path, ppcl_data: Command) -> None:
    (tmp_path / "images").mkdir()
    image, icc = Image.new("RGB", (64, 64), (120, 200, 90)), rgb_profile("Adobe RGB")
    image.save(tmp_path / "images" / "a.png", icc_profile=icc)
    image.convert("RGBA").save(tmp_path / "images" / "b.webp", icc_profile=icc, lossless=True)
    image.quantize(2).save(tmp_path / "images" / "c.gif")
    for name in "abc":
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    write_recipe(tmp_path, heldout=0.0, longest_side=40)
    ppcl_data("shard", tmp_path)
    stored = members(tmp_path / "shards" / "raw")
    for name, colour in {
        "a.png": by_hand((120, 200, 90), "Adobe RGB"),
        "b.jpg": by_hand((120, 200, 90), "Adobe RGB"),
    }.items():
        got = np.asarray(as_rgb(decode(stored[name])))[20, 20]
        np.testing.assert_allclose(got, colour, atol=5)
    np.testing.assert_allclose(np.asarray(as_rgb(decode(stored["c.jpg"])))[20, 20], (120, 200, 90), atol=5)


def test_a_sample_keeps_its_split_when_others_come_and_go(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    before = members(project / "shards" / "raw", "heldout-*.tar").keys()
    Image.new("RGB", (8, 8)).save(project / "images" / "new.png")
    (project / "images" / "new.txt").write_text("new")
    write_recipe(project, shards=str(project / "again"))
    ppcl_data("shard", project)
    after = members(project / "again" / "raw", "heldout-*.tar").keys()
    assert after - {"new.png", "new.txt"} == before


def test_without_heldout_everything_but_hidden_files_is_for_training(project: Path, ppcl_data: Command) -> None:
    (project / "images" / "._001.png").write_bytes(b"left by another system")
    (project / "images" / ".cache").mkdir()
    (project / "images" / ".cache" / "a.png").write_bytes(b"a thumbnail")
    write_recipe(project, heldout=0.0)
    ppcl_data("shard", project)
    assert sum(entry["samples"] for entry in index_of(project / "shards" / "raw")["shards"]) == COUNT
    assert not list((project / "shards" / "raw").glob("heldout*"))


def test_finished_work_is_not_done_again(project: Path, ppcl_data: Command) -> None:
    for name, folder in (("shard", "raw"), ("encode", "encoded")):
        ppcl_data(name, project)
        times = {path: path.stat().st_mtime_ns for path in (project / "shards" / folder).iterdir()}
        assert "already" in ppcl_data(name, project)
        assert {path: path.stat().st_mtime_ns for path in (project / "shards" / folder).iterdir()} == times


def test_a_recipe_section_is_enough(project: Path) -> None:
    data = load_recipe(project / "recipe.yaml").data
    assert shard(data).figures["samples"]["train"] > 0
    with pytest.raises(UserError, match="nowhere: no such file or folder, seen from"):
        shard(data.model_copy(update={"source": "nowhere", "shards": project / "other"}))


def test_a_disk_that_cannot_be_written_is_one_line(project: Path, ppcl_data: Command) -> None:
    (project / "file").write_text("not a folder")
    write_recipe(project, shards=str(project / "file" / "shards"))
    assert f"{project / 'file'}" in ppcl_data.fail("shard", project)


def test_a_worker_that_was_killed_is_one_line(project: Path, ppcl_data: Command) -> None:
    write_recipe(project, samples_per_shard=3)
    killed = "import data_tools.shard as s, os\ns.header_of = lambda *_: os._exit(9)\n"
    (project / "sitecustomize.py").write_text(
        "import sys\nif 'forkserver' in ' '.join(sys.orig_argv):\n    " + killed.replace("\n", "\n    ")
    )
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.cli", "shard", str(project / "recipe.yaml"), "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")]))},
    )
    assert done.returncode == 2, done.stderr
    [line] = said(done.stderr).splitlines()
    assert line.startswith("error: a worker process was killed")
    ppcl_data("shard", project)
    assert len(members(project / "shards" / "raw")) == 2 * COUNT


@pytest.mark.parametrize(("heldout", "side"), [(0.001, "heldout"), (0.999, "train")])
def test_a_split_without_samples_is_refused(project: Path, ppcl_data: Command, heldout: float, side: str) -> None:
    write_recipe(project, heldout=heldout)
    assert f"leaves no {side} samples" in ppcl_data.fail("shard", project)


def test_a_folder_that_others_filled_is_not_overwritten(project: Path, ppcl_data: Command) -> None:
    foreign = project / "shards" / "raw" / "theirs.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    assert "was not written here" in ppcl_data.fail("shard", project)
    assert foreign.read_bytes() == b"precious"


def test_the_summary_is_also_for_programs(project: Path, ppcl_data: Command) -> None:
    code, out, err = ppcl_data.run("shard", project, "--json", "-")
    assert code == 0
    figures = json.loads(out)
    assert sum(figures["samples"].values()) == COUNT
    assert figures["skipped"] == []
    assert "train samples" in err
    ppcl_data("encode", project, "--json", project / "encoded.json")
    assert json.loads((project / "encoded.json").read_text())["samples"] == COUNT
