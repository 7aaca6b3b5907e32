"""Small sources of pictures and captions, a recipe for them, and the `ppcl-data` command as a shell would run it."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import webdataset as wds
import yaml
from PIL import Image

from data_tools import cli
from ppcl_ds.demo.pipeline import DigitsPipeline, PixelVae, WordTable
from tests.conftest import said

COUNT = 30


def write_images(source: Path) -> None:
    """COUNT noise pictures in two folders, as png, jpg and webp in turn; caption `number n`."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        suffix = (".png", ".JPG", ".webp")[number % 3]
        path = source / f"part {number % 2}" / f"{number:03d}.v1{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"number {number}\n")


def make_teacher(folder: Path, width: int = 6, **text: int) -> None:
    """A pipeline folder whose latents are the RGB pixels, and whose prompts are rows of a table of words."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=12,
        out_channels=3,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=width,
        axes_dims_rope=[4, 6, 6],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    DigitsPipeline(scheduler, PixelVae(3), WordTable(width, **text), transformer).save_pretrained(folder)


def write_recipe(folder: Path, teacher: Any = None, **data: Any) -> Path:
    """A recipe whose `data` section has these values changed; its teacher is made, if there is none yet."""
    section = {
        "source": str(folder / "images"),
        "shards": str(folder / "shards"),
        "samples_per_shard": 8,
        "heldout": 0.25,
        "images": {"size": 8},
        "workers": 0,
    }
    if teacher is None and not (folder / "teacher").exists():
        make_teacher(folder / "teacher")
    recipe = {
        "run": str(folder),
        "data": section | data,
        "teacher": teacher or {"path": str(folder / "teacher")},
        "plan": {"variants": {"small": 0.3}},
        "distill": {"steps": 1, "micro_batch": 1, "micro_batches_per_step": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with images and a recipe."""
    write_images(tmp_path / "images")
    write_recipe(tmp_path)
    return tmp_path


@dataclass
class Command:
    """Runs `ppcl-data` as a shell would: arguments in, exit code and output out."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, name: str, target: Path, *more: str | Path) -> str:
        """Run a command that should succeed; its output."""
        code, out, err = self.run(name, target, *more)
        assert code == 0, out + err
        return out

    def fail(self, name: str, target: Path, *more: str | Path) -> str:
        """Run a command that should fail; its one line on stderr behind those that say what it does."""
        code, _, err = self.run(name, target, *more)
        assert code == 2
        err = said(err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    def run(self, name: str, target: Path, *more: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr. `shard` and `encode` take the recipe of the folder `target`."""
        if name in ("shard", "encode"):
            target = target / "recipe.yaml"
        if name != "encode" and "--workers" not in more:
            more = (*more, "--workers", "1")
        self.monkeypatch.setattr(sys, "argv", ["ppcl-data", name, *map(str, (target, *more))])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = self.capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def ppcl_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    for name in list(os.environ):
        if name.startswith("SLURM_ARRAY") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    return Command(monkeypatch, capsys)


def members(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    """Members of every shard in a folder that fits the pattern, by name."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def index_of(folder: Path) -> dict[str, Any]:
    """A folder's `index.json`."""
    return dict(json.loads((folder / "index.json").read_text()))


def tree(folder: Path, without: Iterable[str] = ()) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def abandon(folder: Path) -> None:
    """Let two hours pass for the files that killed processes left in a folder."""
    for path in folder.rglob("*.partial"):
        os.utime(path, (path.stat().st_mtime - 7200,) * 2)


def png(number: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG file, all of one colour."""
    file = BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """Somebody's shard: key -> suffix -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})
