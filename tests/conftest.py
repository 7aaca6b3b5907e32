"""Tiny real teachers of three families with their own encoded shards, made once and copied for each test."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ppcl_ds.data.batch import Size
from ppcl_ds.teacher.teacher import Teacher
from tests.ranks import run, start_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("no deadline", deadline=None)  # the machine may be busy with other test files
hypothesis.settings.load_profile("no deadline")

LONG_SECONDS = 10
"""A test that takes longer on an idle machine stands in long.txt, but for a few on which all others stand."""

LONG = frozenset((Path(__file__).parent / "long.txt").read_text().splitlines())
"""Tests and whole files of tests that `make test` leaves to `make test-long`."""

_OTHERS = ("slurm", "families", "pretend", "tools")
"""Markers of suites of their own."""

WORDS = ["zero", "one", "two", "three"]

TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": (
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": [4, 6, 6],
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "num_single_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": [4, 6, 6],
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "out_channels": 1,
            "num_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
            "dual_attention_layers": [0, 1],
            "qk_norm": "rms_norm",
        },
    ),
}


FLUX_1: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
"""The published FLUX.1 [dev] transformer."""

QWEN_IMAGE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
"""The published Qwen-Image transformer."""

WAN: tuple[str, dict[str, Any]] = (
    "WanTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    },
)
"""A family that can be tapped, though not yet called."""


def pytest_configure(config: pytest.Config) -> None:
    """One server for all workers, whose environment they inherit."""
    if not config.option.collectonly:
        start_server()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what stands in long.txt.

    Raises:
        UsageError: a line is of a file that was collected whole, and there is no such test.
    """
    names = {name for item in items for name in (item.nodeid, item.nodeid.partition("::")[0])}
    for item in items:
        if LONG & {item.nodeid, item.nodeid.partition("::")[0]}:
            item.add_marker("long")
    stale = sorted(name for name in LONG if name not in names and name.partition("::")[0] in names)
    if stale and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/long.txt: there is no test {stale[0]}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there before the first test stays: a collection of garbage need not look at it every time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that take long and are not known to; a busy machine makes them no failures."""
    seconds: dict[str, float] = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport) and not {*_OTHERS, "long"} & set(report.keywords):
            seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    if long := {test: took for test, took in seconds.items() if took > LONG_SECONDS}:
        terminalreporter.section(f"over {LONG_SECONDS} s and not in tests/long.txt", sep="=")
        for test, took in sorted(long.items(), key=lambda each: -each[1]):
            terminalreporter.line(f"{took:.0f}s {test}")


def make_teacher(family: str, folder: Path) -> None:
    """A random teacher of the family: a whole pipeline, saved as its users find it."""
    from tests.pipelines import make_pipeline  # which reads TEACHERS

    make_pipeline(family, folder)


def make_recipe(family: str, run: Path) -> dict[str, Any]:
    """A recipe for the family's tiny teacher; it takes seconds."""
    from tests.pipelines import OPTIONS

    return {
        "run": str(run),
        "data": {
            "source": "{run}/images",
            "shards": "{run}/shards",
            "samples_per_shard": 16,
            "heldout": 0.25,
            "images": {"size": 8},
            "workers": 0,
        },
        "teacher": {"path": "{run}/teacher", "precision": "fp32", "options": OPTIONS[family]},
        "noise": {"uniform_share": 0.3, "caption_dropout": 0.2},
        "probe": {"batch_size": 8, "batches": 4},
        "plan": {"variants": {"medium": 0.34, "small": 0.5}, "max_span": 4},
        "topology": {"stages": 2, "replicas": 1},
        "distill": {
            "steps": 3,
            "micro_batch": 4,
            "micro_batches_per_step": 4,
            "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            "log_every": 1,
            "checkpoint_every": 100,
        },
        "evaluate": {"samples": 8, "batch_size": 4, "steps": 2, "velocity_batches": 2},
    }


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    """A teacher's folder whose transformer has another configuration, and no weights."""
    make_teacher(family, folder)
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    _, config = TEACHERS[family]
    config = config | changes
    edited = {"transformer": config}
    if family == "qwen":  # the others' parts are as wide as the tiny transformers alone
        edited |= {
            "vae": {"channels": config["out_channels"]},
            "text_encoder": {"width": config["joint_attention_dim"]},
        }
    for part, keys in edited.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.fixture(scope="session")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment that has the packages installed here, but not ppcl_ds."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Teacher]:
    """`configured(family, key=value, ...)`: a teacher without weights, which draws 8 x 8 pixels."""
    from tests.pipelines import OPTIONS

    def make(family: str, **changes: Any) -> Teacher:
        folder = write_config(tmp_path / f"{family} {len(list(tmp_path.iterdir()))}", family, **changes)
        return Teacher(folder, False, options=OPTIONS[family], size=Size(8, 8))

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a run folder with images, encoded shards and a teacher; made on first use."""
    made: dict[str, Path] = {}

    def prepare(family: str) -> Path:
        if family not in made:
            from data_tools.encode import encode
            from data_tools.shard import shard
            from ppcl_ds.recipe import Recipe, load_recipe

            run = tmp_path_factory.mktemp(family) / "run"
            (run / "images").mkdir(parents=True)
            random = np.random.default_rng(0)
            for number in range(64):
                image = Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8))
                image.save(run / "images" / f"{number:03d}.png")
                caption = f"a tiny {WORDS[number % 4]}" if number % 3 else WORDS[number % 4]
                (run / "images" / f"{number:03d}.txt").write_text(caption)
            make_teacher(family, run / "teacher")
            path = run / "recipe.yaml"
            path.write_text(yaml.safe_dump(make_recipe(family, run)))
            recipe: Recipe = load_recipe(path)
            shard(recipe.data)
            encode(recipe)
            made[family] = run
        return made[family]

    return prepare


@pytest.fixture
def new_run(prepared: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`new_run(family, section={key: value}, ...)`: a run folder of the test's own; returns its recipe file."""

    def make(family: str, **changes: dict[str, Any]) -> Path:
        run = tmp_path / f"run {len(list(tmp_path.iterdir()))}"  # with a space, as users have them
        shutil.copytree(prepared(family), run)
        recipe = make_recipe(family, run)
        for section, values in changes.items():
            recipe[section] |= values
        path = run / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


def mix_shapes(path: Path) -> None:
    """Give a third of a run's images another aspect ratio, a bucket of its own, and encode them anew."""
    from data_tools.encode import encode
    from data_tools.shard import shard
    from ppcl_ds.recipe import load_recipe

    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["images"]["max_aspect"] = 2.0
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path)
    data = loaded.data
    for image in sorted(Path(data.sources[0]).glob("*.png"))[::3]:
        Image.open(image).resize((6, 10)).save(image)
    shutil.rmtree(data.shards)
    shard(data)
    encode(loaded)


def said(stderr: str) -> str:
    """What a command has printed there, without what it says before it begins (see `tests/test_early.py`)."""
    return "".join(line for line in stderr.splitlines(True) if not line.endswith(" ...\n"))


def command(*arguments: str | Path, program: str = "ppcl_ds.cli", code: int = 0) -> str:
    """Run `ppcl ARGUMENTS` as users do, check its exit code, return what it printed, see `said`."""
    done = run(program, *arguments)
    printed = done.stdout + said(done.stderr)
    assert done.returncode == code, printed
    return printed
