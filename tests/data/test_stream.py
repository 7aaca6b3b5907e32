"""Promises of the stream: numbered micro-batches, whoever reads them, from wherever they lie, whatever is broken."""

from __future__ import annotations

import functools
import http.server
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.data import shards as shards_module
from ppcl_ds.data.batch import Batch, Size
from ppcl_ds.data.index import Index, ShardEntry, split_entries
from ppcl_ds.data.stored import EMPTY, Stored
from ppcl_ds.data.stream import check_data, decode, read_texts
from ppcl_ds.errors import UserError
from tests.data.shards import Read, members, open_stream, prompt, read, section, write_shards


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    st.sets(st.integers(0, 24)),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 4), st.integers(1, 4)),
)
def test_a_run_stops_and_goes_on_with_other_ranks(
    counts: list[int], tall: set[int], micro_batch: int, ranks: tuple[int, int], steps: tuple[int, int]
) -> None:
    """No sample is lost or repeated: what the ranks before and after the stop read is what one rank alone reads."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), counts, sorted(tall))
        data = section(Path(folder))
        per_step = ranks[0] * ranks[1]  # micro-batches of an optimizer step: a multiple of the ranks, before and after
        together: Read = {}
        first = 0
        for world, count in zip(ranks, steps, strict=True):
            for rank in range(world):
                part = read(open_stream(data, micro_batch, per_step), count * per_step // world, first + rank, world)
                assert not part.keys() & together.keys()
                together |= part
            first += count * per_step
        alone = read(open_stream(data, micro_batch, per_step), first)
        assert together == alone
        seen = Counter(key for keys in alone.values() for key in keys)
        for shape in (sorted(tall), sorted(set(range(sum(counts))) - tall)):
            times = [seen[f"k{number}"] for number in shape if number < sum(counts)]
            assert max(times, default=0) - min(times, default=0) <= 1


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5))
def test_worker_processes_change_nothing(workers: int, stride: int, start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), [4, 0, 3], [2, 5])
        alone = read(open_stream(section(Path(folder)), 2, 2), 6, start, stride)
        stream = open_stream(section(Path(folder), workers=workers), 2, 2)
        assert read(stream, 6, start, stride) == alone


def test_what_was_consumed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [5] * 20)
    read_anew: list[int] = []
    get = shards_module.Shards.read

    def watched(self: shards_module.Shards, number: int) -> tuple[str, dict[str, bytes]]:
        read_anew.append(number)
        return get(self, number)

    monkeypatch.setattr(shards_module.Shards, "read", watched)
    stream = open_stream(section(tmp_path), 4)
    keys = read(stream, 3, start=1000)
    assert [f"k{number}" for number in read_anew] == [key for batch in keys.values() for key in batch]


def test_a_launcher_s_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2, 2, 2])
    before = read(open_stream(section(tmp_path), 2), 6)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "WORKER": "1", "NUM_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert read(open_stream(section(tmp_path), 2), 6) == before


def test_latents_sizes_and_captions_stay_together(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 6], [1, 4, 8])
    batches: list[Batch] = [batch for _, batch in islice(open_stream(section(tmp_path), 4).take(0, 1), 6)]
    assert {batch.latents.shape for batch in batches} == {(4, 1, 2, 2), (4, 1, 4, 2)}
    for batch in batches:
        assert batch.size == Size(batch.latents.shape[2], 2)
        assert batch.captions == [sample.key[1:] for sample in batch.samples]
        for latents, sample in zip(batch.latents, batch.samples, strict=True):
            number = int(sample.key[1:])
            assert torch.equal(latents, torch.full(latents.shape, float(number)))
            [(tokens, nothing, pooled)] = sample.prompt.text
            assert torch.equal(tokens, torch.full((1, number % 3 + 1, 2), float(number))), "its own length"
            assert nothing is None
            assert torch.equal(pooled, torch.full((1, 3), float(number)))
            assert latents.dtype == tokens.dtype == pooled.dtype == torch.float32


def test_one_of_several_captions_is_drawn_with_its_own_prompt(tmp_path: Path) -> None:
    prompts = {name: prompt(number) for number, name in enumerate(("", "caption_zh", "long", EMPTY))}
    parts = {
        "safetensors": Stored(torch.zeros(1, 2, 2), Size(2, 2), prompts).write(),
        "txt": b"zero",
        "json": b'{"caption_en": "zero", "caption_zh": "one", "long": "two"}',
    }
    drawn = {}
    for draw in (0.0, 0.4, 0.99):
        sample = decode("shard:key", parts, draw)
        drawn[sample.caption] = int(sample.prompt.text[0][0][0, 0, 0])
        assert sample.empty is not None
        assert sample.empty.text[0][0].shape == (1, 1, 2), "what stands for no caption is never drawn"
    assert drawn == {"zero": 0, "one": 1, "two": 2}


def test_captions_are_dropped_one_by_one(tmp_path: Path) -> None:
    write_shards(tmp_path, [64])
    [(_, batch)] = islice(open_stream(section(tmp_path), 64).take(0, 1), 1)
    empty = prompt(100)

    def dropped(share: float, seed: int) -> list[bool]:
        generator = torch.Generator().manual_seed(seed)
        after = batch.drop_captions(lambda sample: empty, share, generator)[0].samples
        for old, new in zip(batch.samples, after, strict=True):
            assert new.prompt is empty or new.prompt is old.prompt
            assert (new.key, new.caption, new.latents) == (old.key, old.caption, old.latents)
        return [sample.prompt is empty for sample in after]

    assert not any(dropped(0.0, 0))
    assert all(dropped(1.0, 0))
    assert dropped(0.5, 1) == dropped(0.5, 1) != dropped(0.5, 2)
    assert 16 < sum(dropped(0.5, 1)) < 48


def test_what_has_no_caption_may_be_the_twin_of_what_has_one(tmp_path: Path) -> None:
    """As often without caption as else; each twin in turn, and alone where nothing has a caption."""
    write_shards(tmp_path, [64])
    [(_, batch)] = islice(open_stream(section(tmp_path), 64).take(0, 1), 1)
    empty = prompt(100)
    for share in (0.0, 0.2, 0.8, 1.0):
        generators = (torch.Generator().manual_seed(3) for _ in range(2))
        (plain, _), (after, twins) = (
            batch.drop_captions(lambda sample: empty, share, generator, paired)
            for paired, generator in zip((False, True), generators, strict=True)
        )
        gone = [sample.prompt is empty for sample in plain.samples]
        assert [sample.prompt is empty for sample in after.samples] == gone
        captioned = [place for place in range(64) if not gone[place]]
        used = [twins.tolist()[place] for place in range(64) if gone[place] and captioned]
        assert used == [captioned[turn % len(captioned)] for turn in range(len(used))]
        for place, (sample, twin) in enumerate(zip(after.samples, twins.tolist(), strict=True)):
            assert (twin == place) == (not gone[place] or not captioned)
            assert sample.latents is batch.samples[twin].latents


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of a server of `tmp_path`, and what was asked of it; every other request fails."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:  # the name is the library's
            asked.append(self.path)
            if len(asked) % 2:
                self.send_error(404)
            else:
                super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["pipe", "http"])
def test_shards_of_an_address_are_those_of_the_folder(
    tmp_path: Path, kind: str, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "WAITS", (0.01, 0.01))
    paths = write_shards(tmp_path, [3, 2, 4])
    here = read(open_stream(section(tmp_path), 2), 9)
    (tmp_path / "far away").mkdir()
    for path in paths:
        path.rename(tmp_path / "far away" / path.name)
    address = f"pipe:cat '{tmp_path}/far away/{{name}}'" if kind == "pipe" else web[0] + "/far%20away/{name}"
    # A cache that holds one shard: old ones make room for new ones.
    stream = open_stream(
        section(
            tmp_path, address=address, cache=max(path.stat().st_size for path in (tmp_path / "far away").iterdir())
        ),
        2,
    )
    assert read(stream, 9) == here
    if kind == "http":
        assert len(web[1]) >= 6, "each shard needs a second try here"


def test_a_shard_that_cannot_be_opened_is_tried_again_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "WAITS", (0.2, 0.2, 0.2))
    path, *_ = write_shards(tmp_path, [2])
    stream = open_stream(section(tmp_path))
    path.rename(tmp_path / "away")
    threading.Timer(0.3, (tmp_path / "away").rename, [path]).start()
    assert len(read(stream, 2)) == 2
    stream = open_stream(section(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"shard train-000000.tar cannot be read after 4 tries \(.*No such file"):
        read(stream, 1)
    stream = open_stream(section(tmp_path, address=f"pipe:cat {tmp_path}/away/{{name}} 2>/dev/null"))
    with pytest.raises(UserError, match=r"shard train-000000.tar cannot be read after 4 tries"):
        read(stream, 1)
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / path.name).write_bytes(b"another file")
    with pytest.raises(UserError, match="it is not the shard that the index describes"):
        read(stream, 1)


def indexed(folder: Path, names: list[str]) -> Path:
    encoded = folder / "encoded"
    encoded.mkdir()
    for name in names:
        (encoded / name).write_bytes(b"12345")
    entries = [ShardEntry(name=name, samples=1, size=5, sha256="", offsets=[0]) for name in names]
    Index(shards=entries).write(encoded / "index.json")
    return folder


def test_shards_of_a_split_are_those_of_the_index_in_its_order(tmp_path: Path) -> None:
    folder = indexed(tmp_path, ["train-000001.tar", "heldout-000000.tar", "train-000000.tar"])
    (folder / "encoded" / "train-000002.tar").write_bytes(b"not listed")
    names = [entry.name for entry in split_entries(section(folder), "train")]
    assert names == ["train-000001.tar", "train-000000.tar"]
    assert [entry.name for entry in split_entries(section(folder), "heldout")] == ["heldout-000000.tar"]


def test_what_stands_between_a_user_and_the_shards_is_said_in_one_line(tmp_path: Path) -> None:
    data = section(tmp_path)
    with pytest.raises(UserError, match=r"index.json is missing; run `ppcl-data encode RECIPE`"):
        split_entries(data, "train")
    with pytest.raises(UserError, match=r"texts.safetensors is missing; run `ppcl-data encode RECIPE`"):
        read_texts(data)
    encoded = indexed(tmp_path, ["train-000000.tar", "train-000001.tar"]) / "encoded"
    with pytest.raises(UserError, match="no heldout samples"):
        split_entries(data, "heldout")
    (encoded / "train-000001.tar").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"train-000001.tar is missing or cut short; run `ppcl-data encode RECIPE`"):
        split_entries(data, "train")
    (encoded / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000.tar is missing or cut short"):
        split_entries(data, "train")
    (encoded / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged") as fault:
        split_entries(data, "train")
    assert "\n" not in str(fault.value)
    (encoded / "texts.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"texts.safetensors: damaged .*; delete it and run `ppcl-data encode RECIPE`"):
        read_texts(data)


def test_shards_of_an_earlier_release_are_to_be_encoded_again(tmp_path: Path) -> None:
    """They held `prompt_embeds`, and `empty.safetensors` lay beside them."""
    again = "encoded by an earlier release; run `ppcl-data encode RECIPE` again"
    tensors = {"latents": torch.zeros(1, 2, 2), "prompt_embeds": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=f"^{again}$"):
        decode("shard:key", {"safetensors": safetensors.torch.save(tensors), "txt": b"a"})
    [path] = write_shards(tmp_path, [4])
    safetensors.torch.save_file({"prompt_embeds": torch.zeros(1, 2)}, path.with_name("empty.safetensors"))
    with pytest.raises(UserError, match=f"^{tmp_path}/encoded was {again}$"):
        check_data(section(tmp_path), heldout=False)


def test_members_are_what_the_shards_hold(tmp_path: Path) -> None:
    """The reader gives back the very bytes that were written."""
    write_shards(tmp_path, [2])
    stream = open_stream(section(tmp_path))
    name, parts = stream.decoder.shards.read(1)
    assert name == "train-000000.tar:k1"
    assert parts == {"txt": b"1", "safetensors": members(1)["safetensors"]}
