"""Promises of the stream: one order for the whole run, whoever reads it."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.data.batch import Batch
from ppcl_ds.data.stream import Index, MicroBatchStream, ShardEntry, empty_prompt, split_shards
from ppcl_ds.errors import UserError


def write_shards(folder: Path, counts: list[int]) -> list[Path]:
    """Shards whose sample number n has latents and embeddings full of n, n % 3 + 1 tokens and the key `kn`."""
    shards: list[Path] = []
    number = 0
    for count in counts:
        path = folder / f"train-{len(shards):06d}.tar"
        with path.open("wb") as file, wds.TarWriter(file, encoder=False) as writer:
            for _ in range(count):
                tensors = {
                    "latents": torch.full((1, 2, 2), number, dtype=torch.bfloat16),
                    "prompt_embeds": torch.full((number % 3 + 1, 2), number, dtype=torch.bfloat16),
                    "pooled": torch.full((3,), number, dtype=torch.bfloat16),
                }
                member = safetensors.torch.save(tensors)
                writer.write({"__key__": f"k{number}", "txt": str(number).encode(), "safetensors": member})
                number += 1
        shards.append(path)
    return shards


def keys(stream: MicroBatchStream, micro_batches: int, start: int = 0, stride: int = 1) -> list[tuple[str, ...]]:
    return [batch.keys for _, batch in islice(stream.take(start, stride), micro_batches)]


def flat(batches: list[tuple[str, ...]]) -> list[str]:
    return [key for batch in batches for key in batch]


counts = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(counts, st.integers(0, 5), st.integers(1, 20), st.booleans())
def test_every_sample_is_seen_exactly_once_per_epoch(counts: list[int], seed: int, window: int, shuffle: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), counts)
        stream = MicroBatchStream(shards, 1, seed, masked=True, shuffle=shuffle, window=window)
        seen = flat(keys(stream, 3 * sum(counts)))
    everything = {f"k{number}" for number in range(sum(counts))}
    for epoch in range(3):
        part = seen[epoch * sum(counts) : (epoch + 1) * sum(counts)]
        assert len(part) == len(everything)
        assert set(part) == everything


@settings(max_examples=25, deadline=None)
@given(counts, st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_the_order_does_not_depend_on_the_number_of_ranks(
    counts: list[int], micro_batch: int, ranks: int, window: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), counts)
        alone = MicroBatchStream(shards, micro_batch, 7, masked=True, window=window)
        expected = dict(enumerate(keys(alone, 3 * ranks)))
        together: dict[int, tuple[str, ...]] = {}
        for rank in range(ranks):
            stream = MicroBatchStream(shards, micro_batch, 7, masked=True, window=window)
            together |= {number: batch.keys for number, batch in islice(stream.take(rank, ranks), 3)}
    assert together == expected


def test_micro_batches_are_cut_from_the_samples_laid_end_to_end(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3, 4])
    one_by_one = flat(keys(MicroBatchStream(shards, 1, 0, masked=True), 15))
    assert flat(keys(MicroBatchStream(shards, 5, 0, masked=True), 3)) == one_by_one, "5 does not divide an epoch of 7"


def test_a_run_may_start_at_any_micro_batch(tmp_path: Path) -> None:
    stream = MicroBatchStream(write_shards(tmp_path, [4, 4]), 3, 0, masked=True)
    assert keys(stream, 4, start=5) == keys(stream, 9)[5:]


@settings(max_examples=25, deadline=None)
@given(counts, st.integers(1, 4), st.integers(0, 40), st.integers(1, 20))
def test_epochs_that_lie_behind_are_not_read(counts: list[int], micro_batch: int, start: int, window: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), counts)
        slow = MicroBatchStream(shards, micro_batch, 7, masked=True, window=window)
        quick = MicroBatchStream(shards, micro_batch, 7, masked=True, window=window, samples=sum(counts))
        read: list[int] = []
        whole_epoch = quick._epoch
        quick._epoch = lambda epoch: read.append(epoch) or whole_epoch(epoch)  # type: ignore[func-returns-value, method-assign]
        assert keys(quick, 3, start=start) == keys(slow, start + 3)[start:]
        assert read[0] == start * micro_batch // sum(counts)


def test_a_launcher_s_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = MicroBatchStream(write_shards(tmp_path, [2, 2, 2]), 2, 0, masked=True)
    before = keys(stream, 6)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "WORKER": "1", "NUM_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert keys(stream, 6) == before


def test_epochs_and_seeds_differ_in_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [10, 10])
    seen = flat(keys(MicroBatchStream(shards, 1, 0, masked=True), 40))
    assert seen[:20] != seen[20:]
    assert seen[:20] != flat(keys(MicroBatchStream(shards, 1, 1, masked=True), 20))
    assert seen[:20] != sorted(seen[:20], key=lambda key: int(key[1:]))


def test_the_order_of_a_seed_stays_what_it_is(tmp_path: Path) -> None:
    """Resuming counts on it: a changed order is a new seed's order, not this one's."""
    stream = MicroBatchStream(write_shards(tmp_path, [4, 4]), 1, 0, masked=True, window=4)
    assert flat(keys(stream, 8)) == ["k6", "k5", "k7", "k4", "k0", "k2", "k3", "k1"]


def test_unshuffled_samples_come_in_stored_order_without_end(tmp_path: Path) -> None:
    stream = MicroBatchStream(write_shards(tmp_path, [2, 1]), 1, 0, masked=True, shuffle=False)
    assert flat(keys(stream, 7)) == ["k0", "k1", "k2", "k0", "k1", "k2", "k0"]


def test_latents_and_captions_stay_together(tmp_path: Path) -> None:
    stream = MicroBatchStream(write_shards(tmp_path, [5, 6]), 4, 3, masked=True, window=6)
    batches = [batch for _, batch in islice(stream.take(0, 1), 6)]
    for batch in batches:
        assert isinstance(batch, Batch)
        assert batch.prompts.mask is not None
        assert batch.prompts.pooled is not None
        assert batch.latents.dtype == batch.prompts.embeds.dtype == batch.prompts.pooled.dtype == torch.float32
        for row, key in enumerate(batch.keys):
            number, mask = int(key[1:]), batch.prompts.mask[row]
            assert (batch.latents[row] == number).all()
            assert (batch.prompts.embeds[row, mask] == number).all()
            assert mask.sum() == number % 3 + 1
            assert (batch.prompts.pooled[row] == number).all()


def test_families_without_a_text_mask_get_none(tmp_path: Path) -> None:
    stream = MicroBatchStream(write_shards(tmp_path, [3]), 1, 0, masked=False)
    assert next(stream.take(0, 1))[1].prompts.mask is None


def one_message(fault: pytest.ExceptionInfo[UserError]) -> str:
    message = str(fault.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("missing", ["txt", "safetensors"])
def test_a_sample_that_lacks_a_member_is_named(tmp_path: Path, missing: str) -> None:
    members = {"txt": b"a", "safetensors": safetensors.torch.save({"latents": torch.zeros(1, 1, 1)})}
    del members[missing]
    with wds.TarWriter(str(tmp_path / "train-000000.tar"), encoder=False) as writer:
        writer.write({"__key__": "lonely", **members})
    with pytest.raises(UserError) as fault:
        keys(MicroBatchStream([tmp_path / "train-000000.tar"], 1, 0, masked=True), 1)
    assert f"train-000000.tar:lonely: no .{missing} member" in one_message(fault)


@pytest.mark.parametrize(
    ("member", "why"),
    [(b"nonsense", "not a safetensors file"), (safetensors.torch.save({}), "no tensor `latents`")],
)
def test_a_sample_with_bad_tensors_is_named(tmp_path: Path, member: bytes, why: str) -> None:
    with wds.TarWriter(str(tmp_path / "train-000000.tar"), encoder=False) as writer:
        writer.write({"__key__": "odd", "txt": b"a", "safetensors": member})
    with pytest.raises(UserError) as fault:
        keys(MicroBatchStream([tmp_path / "train-000000.tar"], 1, 0, masked=True), 1)
    assert f"train-000000.tar:odd: {why}" in one_message(fault)


@pytest.mark.parametrize("content", [b"", b"this is not a tar", None, "cut"])
def test_a_broken_tar_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    (shard,) = write_shards(tmp_path, [3])
    if isinstance(content, bytes):
        shard.write_bytes(content)
    elif content == "cut":
        shard.write_bytes(shard.read_bytes()[:1800])
    else:
        shard.unlink()
    with pytest.raises(UserError) as fault:
        keys(MicroBatchStream([shard], 1, 0, masked=True, shuffle=False), 3)
    assert f"{shard}: not a whole tar" in one_message(fault)


def test_shards_without_samples_do_not_hang(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples in"):
        keys(MicroBatchStream(write_shards(tmp_path, [0]), 1, 0, masked=True), 1)


def indexed(folder: Path, names: list[str]) -> Path:
    encoded = folder / "encoded"
    encoded.mkdir()
    for name in names:
        (encoded / name).write_bytes(b"12345")
    entries = [ShardEntry(name=name, samples=1, size=5, sha256="") for name in names]
    Index(shards=entries).write(encoded / "index.json")
    return folder


def test_shards_of_a_split_are_those_of_the_index_in_its_order(tmp_path: Path) -> None:
    folder = indexed(tmp_path, ["train-000001.tar", "heldout-000000.tar", "train-000000.tar"])
    (folder / "encoded" / "train-000002.tar").write_bytes(b"not listed")
    names = [path.name for path in split_shards(folder, "train")]
    assert names == ["train-000001.tar", "train-000000.tar"]
    assert [path.name for path in split_shards(folder, "heldout")] == ["heldout-000000.tar"]


def test_what_stands_between_a_user_and_the_shards_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index.json is missing; run `ppcl-data encode RECIPE`") as fault:
        split_shards(tmp_path, "train")
    one_message(fault)
    with pytest.raises(UserError, match=r"empty.safetensors is missing; run `ppcl-data encode RECIPE`"):
        empty_prompt(tmp_path, masked=True)
    folder = indexed(tmp_path, ["train-000000.tar", "train-000001.tar"])
    with pytest.raises(UserError, match="no heldout samples"):
        split_shards(folder, "heldout")
    (folder / "encoded" / "train-000001.tar").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"train-000001.tar is missing or cut short; run `ppcl-data encode RECIPE`"):
        split_shards(folder, "train")
    (folder / "encoded" / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000.tar is missing or cut short"):
        split_shards(folder, "train")
    (folder / "encoded" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged") as fault:
        split_shards(folder, "train")
    one_message(fault)


def test_the_empty_prompt_has_a_mask_where_the_family_reads_one(tmp_path: Path) -> None:
    (tmp_path / "encoded").mkdir()
    stored = {"prompt_embeds": torch.ones(2, 4, dtype=torch.bfloat16), "pooled": torch.ones(3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(stored, tmp_path / "encoded" / "empty.safetensors")
    prompt = empty_prompt(tmp_path, masked=True)
    assert prompt.embeds.shape == (1, 2, 4)
    assert prompt.mask is not None
    assert prompt.mask.tolist() == [[True, True]]
    assert prompt.pooled is not None
    assert prompt.pooled.shape == (1, 3)
    assert empty_prompt(tmp_path, masked=False).mask is None
