"""Parts of the samples, summed apart and merged, are one run; what does not belong together is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ppcl_ds.errors import UserError
from ppcl_ds.probing.part_files import Contents, Part, Parts, made_with, write_part
from ppcl_ds.probing.probe import check
from ppcl_ds.probing.report import ProbeReport, load_report
from ppcl_ds.probing.sums import Lane, Sums, zero_sums
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from tests.conftest import command
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LANES = (Lane("image", 0, 4, 5), Lane("text", 0, 3, 5))
SPAN = 8  # as in the recipes here


def equal(ours: ProbeReport, other: ProbeReport) -> None:
    """Alike up to the rounding of sums that were added in another order."""
    assert (ours.spans, ours.unused, ours.tokens) == (other.spans, other.unused, other.tokens)
    assert ours.figures.keys() == other.figures.keys() == {"image", "text", "mean"}
    for stream, figures in ours.figures.items():
        for name, figure in figures.items():
            left, right = (np.array(f.value, dtype=float) for f in (figure, other.figures[stream][name]))
            np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-9, err_msg=f"{name} of {stream}")


def test_parts_and_ranges_on_two_ranks_give_the_report_of_a_single_run(new_run: Callable[..., Path]) -> None:
    # Five micro-batches: neither ranks nor parts divide them.
    path = new_run("qwen", probe={"batches": 5, "batch_size": 6})
    run_ranks("tests.probing.parts_on_ranks", path)
    whole, ranged, merged = (load_report(path.parent / name) for name in ("whole", "ranged", "probe"))
    assert whole.unused == ["text"]
    assert whole.tokens["image"] == 5 * 6 * 16
    assert whole == ranged
    equal(whole, merged)
    printed = command("probe", path, "--part", "4/3", code=2)
    assert printed.startswith("error: --part 4/3")


def random_sums(seed: int, blocks: range = range(4)) -> Sums:
    generator = torch.Generator().manual_seed(seed)
    sums = zero_sums(LANES, blocks, SPAN, CPU)
    for own in sums.values():
        for tensor in own.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return sums


class Folder:
    """A recipe's folder of parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read()
        self.parts = self.recipe.probe_folder / "parts"

    def read(self) -> None:
        self.recipe: Recipe = load_recipe(self.path)
        self.teacher = open_teacher(self.recipe)

    def write(self, index: int, count: int, seed: int = 0) -> Path:
        """Range by range, the last first."""
        whole = random_sums(seed)
        ranges = [{key: own for key, own in whole.items() if key.block in blocks} for blocks in ([3], [1, 2], [0])]
        path = self.parts / Part(index, count).file
        write_part(path, Contents(LANES, ("text",), made_with(self.recipe, self.teacher.files)), iter(ranges), SPAN)
        return path

    def merge(self) -> Parts:
        return Parts(self.parts, self.recipe, self.teacher.files)

    def edit(self, change: Callable[[dict], None]) -> None:
        recipe = yaml.safe_load(self.path.read_text())
        change(recipe)
        self.path.write_text(yaml.safe_dump(recipe))
        self.read()


@pytest.fixture
def folder(new_run: Callable[..., Path]) -> Folder:
    return Folder(new_run("qwen"))


def test_merging_adds_up_exactly_and_leaves_the_parts_as_they_were(folder: Folder) -> None:
    paths = [folder.write(index, 3, seed=index) for index in (1, 2, 3)]
    before = [path.read_bytes() for path in paths]
    parts = folder.merge()
    assert parts.contents.lanes == LANES
    assert parts.contents.unused == ("text",)
    one, two, three = (random_sums(seed) for seed in (1, 2, 3))
    found: Sums = {}
    for sums in parts.sums([range(2, 4), range(2)], CPU):
        found |= sums
    assert found.keys() == one.keys()
    for key, own in found.items():
        for name, tensor in own.tensors().items():
            expected = one[key].tensors()[name] + two[key].tensors()[name] + three[key].tensors()[name]
            assert torch.equal(tensor, expected)
    assert [path.read_bytes() for path in paths] == before


def test_a_part_that_dies_while_it_writes_leaves_the_one_before(folder: Folder) -> None:
    path = folder.write(1, 1)
    before = path.read_bytes()
    whole = random_sums(5)

    def dying():  # type: ignore[no-untyped-def]
        yield {key: own for key, own in whole.items() if key.block == 3}
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_part(path, Contents(LANES, (), {}), dying(), SPAN)
    assert path.read_bytes() == before
    folder.merge()


def test_a_part_that_is_not_there_is_named(folder: Folder) -> None:
    with pytest.raises(UserError, match="no parts to merge"):
        folder.merge()
    for index in (1, 3):
        folder.write(index, 4)
    with pytest.raises(UserError, match=r"part-002-of-004.safetensors, part-004.* missing \(2 of 4\).*--part 2/4"):
        folder.merge()
    folder.write(1, 2)
    with pytest.raises(UserError, match="parts of 2 and of 4 are mixed"):
        folder.merge()


def other_noise(folder: Folder) -> None:
    folder.edit(lambda recipe: recipe["noise"].update(caption_dropout=0.5))


def other_batches(folder: Folder) -> None:
    folder.edit(lambda recipe: recipe["probe"].update(batches=6))


def other_shards(folder: Folder) -> None:
    index = folder.recipe.data.shards / "encoded" / "index.json"
    changed = json.loads(index.read_text())
    for entry in changed["shards"]:
        entry["sha256"] = "0" * 64
    index.write_text(json.dumps(changed))


def other_teacher(folder: Folder) -> None:
    [weights] = folder.teacher.files.folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"abcd")


def cut_short(folder: Folder) -> None:
    path = folder.parts / "part-001-of-001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_noise, "made with another noise in the recipe"),
        (other_batches, "made with another probe.batches in the recipe"),
        (other_shards, "made with another set of shards"),
        (other_teacher, "made with another teacher"),
        (cut_short, "damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_foreign_part_is_refused_in_one_line(folder: Folder, change: Callable[[Folder], None], words: str) -> None:
    folder.write(1, 1)
    folder.merge()
    change(folder)
    with pytest.raises(UserError, match=words) as refused:
        folder.merge()
    assert "part-001-of-001" in str(refused.value)
    assert "--part 1/1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_the_sums_do_not_depend_on_may_change(folder: Folder) -> None:
    folder.write(1, 1)
    folder.edit(lambda recipe: recipe["probe"].update(ridge=0.5, blocks_at_once=1))
    folder.edit(lambda recipe: recipe.update(topology={"stages": 1, "replicas": 1}))
    folder.merge()


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "1/4/2", "1/5"])
def test_a_part_that_cannot_be_is_refused(folder: Folder, text: str) -> None:
    with pytest.raises(UserError, match="--part"):
        Part.parse(text, 4)


def test_a_part_is_not_merged_at_the_same_time(folder: Folder) -> None:
    with pytest.raises(UserError, match="--part and --merge"):
        check(folder.recipe, "1/2", merge=True)


def test_a_plan_with_spans_that_no_probe_measures_is_refused(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"plan.max_span is 9.*probe.max_span = 8"):
        folder.edit(lambda recipe: recipe["plan"].update(max_span=9))
