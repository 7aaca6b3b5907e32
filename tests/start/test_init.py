"""`ppcl init`: what it writes is a recipe that runs, and what it cannot use it says in one line."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_tools.encode import encode
from data_tools.shard import shard
from ppcl_ds.data.index import split_entries
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.start.init import init
from ppcl_ds.start.pipeline import Because
from ppcl_ds.start.source import LOOKED, Look, look
from ppcl_ds.teacher import surgery
from ppcl_ds.teacher.own import Own
from tests.clips import noise, write_clip
from tests.conftest import command
from tests.families.pipelines import PIPELINES
from tests.families.pipelines.parts import CHANNELS, WIDTH, flow, flux2_vae, mistral3, transformer
from tests.families.pipelines.words import qwen_tokenizer
from tests.pipelines import make_pipeline

SIDES = {"mochi": 16, "flux2": 16, "wan22": 16, "pixart": 16, "qwen": 8}


def flux2() -> diffusers.Flux2Pipeline:
    """With a text encoder as deep as the pipeline reads if it is not told otherwise: layers 10, 20 and 30."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2Pipeline(
        transformer=transformer("flux2", in_channels=4 * CHANNELS, joint_attention_dim=3 * WIDTH),
        vae=flux2_vae(),
        text_encoder=mistral3(tokenizer, layers=30),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


def draw_images(folder: Path, count: int, width: int, height: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a tiny {'one' if number % 2 else 'two'}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a folder with a pipeline and images, made on first use."""
    root = tmp_path_factory.mktemp("init")

    def make(name: str) -> Path:
        if not (root / name).exists():
            (root / name).mkdir()
            if name == "qwen":
                make_pipeline("qwen", root / name / "teacher")
            else:
                (flux2() if name == "flux2" else PIPELINES[name].make()).save_pretrained(root / name / "teacher")
            draw_images(root / name / "images", 24, SIDES[name], SIDES[name])
        return root / name

    return make


@pytest.fixture
def started(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Recipe, str]]:
    """`started(name, gpus, memory, source)`: the recipe that is written, and its text."""
    monkeypatch.chdir(tmp_path)

    def start(name: str, gpus: int | None = 0, memory: float | None = None, source: str = "") -> tuple[Recipe, str]:
        out = Path(f"{name}-{len(list(tmp_path.iterdir()))}.yaml")
        init(made(name) / "teacher", source or str(made(name) / "images"), out, gpus, memory)
        return load_recipe(out), out.read_text()

    return start


DRAWN = {"flux2": (1.0, 50), "wan22": (5.0, 50), "pixart": (4.5, 20), "qwen": (1.25, 20)}
"""Guidance and steps by the signature of the pipelines' calls; FLUX.2's transformer reads its guidance as a number."""


@pytest.mark.parametrize("name", DRAWN)
def test_the_recipe_loads_and_says_why(name: str, started: Callable[..., tuple[Recipe, str]]) -> None:
    recipe, text = started(name)
    assert recipe.data.images.size == SIDES[name]
    assert recipe.data.images.max_aspect == 1
    assert (recipe.evaluate.guidance, recipe.evaluate.steps) == DRAWN[name]
    assert recipe.teacher.precision == "fp32"
    assert recipe.topology.world == 1
    assert recipe.finetune is None
    for key in (
        "heldout",
        "size",
        "max_aspect",
        "precision",
        "batches",
        "variants",
        "stages",
        "steps",
        "guidance",
        "lr",
    ):
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
        assert lines
        assert all("  # " in line for line in lines), key
    assert "`ppcl estimate`: " in text


def test_what_is_commented_is_a_recipe_too(started: Callable[..., tuple[Recipe, str]], tmp_path: Path) -> None:
    _, text = started("wan22")
    opened = text.replace("# finetune:", "finetune:").replace("\n#   ", "\n   ").replace("  # width:", "  width:")
    path = tmp_path / "opened.yaml"
    path.write_text(opened)
    recipe = load_recipe(path)
    assert recipe.tuning.variants == ("small",)
    assert recipe.plan.width == ("ffn", "narrow")  # Wan's text comes by cross-attention, so no unit can make it linear


def test_one_of_two_transformers_is_named_beside_the_other(started: Callable[..., tuple[Recipe, str]]) -> None:
    recipe, text = started("wan22")
    assert recipe.teacher.component == "transformer"
    [line] = [line for line in text.splitlines() if "component:" in line]
    assert "transformer_2" in line
    assert "component:" not in started("pixart")[1]


def test_the_written_recipe_runs(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = command("init", made("pixart") / "teacher", made("pixart") / "images", "--out", "r.yaml", "--gpus", "0")
    assert "wrote r.yaml" in printed
    assert "ppcl-data shard r.yaml" in printed
    recipe = load_recipe(Path("r.yaml"))
    shard(recipe.data)
    encode(recipe)
    command("probe", "r.yaml")
    command("plan", "r.yaml")
    assert set(yaml.safe_load(recipe.plan_file.read_text())["variants"]) == {"large", "medium", "small"}
    command("distill", "r.yaml", "--until", "1")


def test_gpus_as_told(started: Callable[..., tuple[Recipe, str]]) -> None:
    recipe, text = started("pixart", 2, 24)
    assert recipe.topology.world == 2
    assert recipe.teacher.precision == "bf16"
    assert recipe.distill.micro_batch * recipe.distill.micro_batches_per_step == 64
    assert "cluster:" not in text
    recipe, text = started("pixart", 16, 24)
    assert recipe.topology.world == 16
    assert "cluster:" in text
    assert recipe.cluster.processes_per_node == 8


def test_memory_decides_how_a_run_is_laid_out(started: Callable[..., tuple[Recipe, str]]) -> None:
    """The tiny teacher on GPUs of megabytes: the smaller they are, the less a step takes, until none fits."""
    peaks = []
    for memory in (24, 0.0012, 0.0008):
        distill = started("pixart", 1, memory)[0].distill
        peaks.append((-distill.micro_batch, distill.activation_checkpointing, distill.optimizer.offload))
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[1]
    with pytest.raises(UserError, match="the least is 1 GB"):
        started("pixart", 1, 0.0001)


def test_larger_oblong_images(started: Callable[..., tuple[Recipe, str]], tmp_path: Path) -> None:
    draw_images(tmp_path / "oblong", 12, 40, 24)
    recipe, text = started("pixart", source=str(tmp_path / "oblong"))
    assert recipe.data.images.size == 16  # the pipeline's own
    assert "by itself" in text
    assert recipe.data.images.max_aspect == 2


def test_every_kind_of_source_is_looked_at(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 3, 20, 10)
    paths = [str(path) for path in sorted((tmp_path / "images").glob("*.png"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"path": p, "caption": "a"}) + "\n" for p in paths))
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{path},a\n" for path in paths))
    shutil.make_archive(str(tmp_path / "shard"), "tar", tmp_path / "images")
    import pyarrow
    import pyarrow.parquet

    held = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    pyarrow.parquet.write_table(pyarrow.table({"image": held, "text": ["a"] * 3}), tmp_path / "rows.parquet")
    for source in ("images", "rows.jsonl", "rows.csv", "shard.tar", "rows.parquet", "rows.{jsonl,csv}"):
        found = look(str(tmp_path / source))
        assert set(found.images) == {(20, 10, 1)}, source
        assert found.samples == (6 if "{" in source else 3)
    assert look("https://host/{000..012}.tar").images == ()


def draw_clips(folder: Path, lengths: list[int], side: int) -> None:
    """As files and as folders of frames, in turn."""
    for number, length in enumerate(lengths):
        name = folder / f"clip{number}"
        if number % 2:
            name.mkdir()
            for place, frame in enumerate(noise(length, side, side)):
                frame.save(name / f"{place:03d}.png")
        else:
            write_clip(name.with_suffix(".mkv" if number % 4 else ".mp4"), noise(length, side, side))
        name.with_suffix(".txt").write_text("a tiny clip")


def test_clips_are_looked_at_wherever_they_lie(tmp_path: Path) -> None:
    """Lengths by what each container says of itself, which is what was written."""
    draw_clips(tmp_path / "clips", lengths := [5, 6, 7, 8], 16)
    rows = [{"video": name, "caption": "a"} for name in ("clip0.mp4", "clip1", "clip2.mkv", "clip3")]
    (tmp_path / "clips" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.make_archive(str(tmp_path / "shard"), "tar", tmp_path / "clips")
    for source, found in (("clips", lengths), ("clips/t.jsonl", lengths), ("shard.tar", [5, 7])):
        seen = look(str(tmp_path / source)).images
        assert sorted(seen) == [(16, 16, each) for each in found] or source == "shard.tar", source
        assert {(16, 16, each) for each in found} <= set(seen), source


@pytest.mark.parametrize("captions", [False, True])
def test_a_recipe_for_clips(
    captions: bool, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many frames as nine in ten clips have and the VAE reads, or as the pipeline draws by itself; it runs."""
    monkeypatch.chdir(tmp_path)
    if captions:
        (tmp_path / "source.txt").write_text("a tiny clip\n" * 20)
    else:
        draw_clips(tmp_path / "source", [3, *[7] * 23], SIDES["wan22"])
    name = "mochi" if captions else "wan22"
    if captions:  # it draws 480 x 848 by itself
        monkeypatch.setattr("ppcl_ds.start.init.side_of", lambda *given: (Because(16, "small"), None))
    init(made(name) / "teacher", "source.txt" if captions else "source", Path("r.yaml"), 0, None)
    recipe = load_recipe(Path("r.yaml"))
    drawn = inspect.signature(diffusers.MochiPipeline.__call__).parameters["num_frames"].default
    assert recipe.data.sizes == ({f"{SIDES[name]}x{SIDES[name]}x{drawn}": 1} if captions else {})
    assert recipe.data.images.frames == (1 if captions else 5)
    if not captions:
        [line] = [line for line in Path("r.yaml").read_text().splitlines() if line.strip().startswith("frames:")]
        assert "nine in ten clips have 7" in line
        shard(recipe.data)
        encode(recipe)
        shapes = {shape for entry in split_entries(recipe.data, "train") for shape in entry.shapes}
        assert {len(shape.split("x")) for shape in shapes} == {4}, "channels, frames, height, width"


def test_no_more_than_the_first_images_are_looked_at(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 1, 8, 8)
    for number in range(LOOKED + 40):
        shutil.copy(tmp_path / "images" / "00.png", tmp_path / "images" / f"n{number}.png")
        (tmp_path / "images" / f"n{number}.txt").write_text("a")
    found = look(str(tmp_path / "images"))
    assert len(found.images) == LOOKED
    assert found.samples is None


def _no_pipeline(folder: Path) -> None:
    (folder / "teacher").mkdir()


def _no_transformer(folder: Path) -> None:
    (folder / "teacher").mkdir()
    (folder / "teacher" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def test_tables_and_shards_of_captions_are_no_images(tmp_path: Path) -> None:
    """And a table whose images are missing is not one of captions."""
    (tmp_path / "a.jsonl").write_text('{"caption": "a cat"}\n' * 3)
    (tmp_path / "a.csv").write_text("caption,source\na cat,web\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a cat"], "score": [0.5]}), tmp_path / "a.parquet")
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "0.txt").write_text("a cat")
    shutil.make_archive(str(tmp_path / "a"), "tar", tmp_path / "shard")
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.tar"):
        assert look(str(tmp_path / name)) == Look((), captions=True), name
    (tmp_path / "gone.csv").write_text("path,caption\ngone.png,a cat\n")
    with pytest.raises(UserError, match="no image"):
        look(str(tmp_path / "gone.csv"))


def test_captions_are_enough(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a tiny one\na tiny two\n" * 20)
    init(made("qwen") / "teacher", "captions.txt", tmp_path / "recipe.yaml", 0, None)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    side = recipe.data.images.size
    assert recipe.data.sizes == {f"{side}x{side}": 1}
    assert recipe.distill.trajectories is not None
    assert recipe.distill.trajectories.guidance == (recipe.evaluate.guidance,) * 2
    shard(recipe.data)
    encode(recipe)


def _no_captions(folder: Path) -> None:
    for path in (folder / "images").glob("*.txt"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (None, ["nowhere", "images"], "teacher nowhere: no such file or folder"),
        (_no_pipeline, ["teacher", "images"], "no readable model_index.json"),
        (_no_transformer, ["teacher", "images"], "it has no transformer"),
        (None, ["images", "nowhere"], "source nowhere: no such file or folder"),
        (_no_captions, ["images", "images"], "no image .* with a caption"),
        (None, ["images", "notes.doc"], "neither a folder, nor a table"),
        (None, ["images", "broken.tar"], "cannot be read"),
        (None, ["images", "images", "--gpus", "12", "--gpu-memory", "80"], "a multiple of 8"),
        (None, ["images", "images", "--gpus", "2"], "--gpu-memory"),
        (None, ["images", "images", "--gpu-memory", "80"], "--gpus"),
        (None, ["images", "images", "--out", "notes.doc"], "there already"),
    ],
)
def test_refusals(
    change: Callable[[Path], None] | None,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images", 2, 8, 8)
    for name in ("captions.txt", "notes.doc", "broken.tar"):
        (tmp_path / name).write_text("a cat\n" * 200)
    if change:
        change(tmp_path)
    printed = command("init", *arguments, code=2)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.search(says, line), line
    assert not list(tmp_path.glob("*.yaml"))


def test_clips_for_a_pipeline_of_images(started: Callable[..., tuple[Recipe, str]], tmp_path: Path) -> None:
    draw_clips(tmp_path / "clips", [5, 5], 16)
    with pytest.raises(UserError, match="it has clips; PixArtSigmaPipeline draws images"):
        started("pixart", source=str(tmp_path / "clips"))


def test_images_that_are_too_small(started: Callable[..., tuple[Recipe, str]], tmp_path: Path) -> None:
    draw_images(tmp_path / "small", 2, 2, 2)
    with pytest.raises(UserError, match="needs 4 x 4"):
        started("pixart", source=str(tmp_path / "small"))


def test_a_family_that_keeps_all_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chroma's modulations are counted along its blocks, and nobody has said how."""
    monkeypatch.setattr(surgery, "own_of", lambda name: Own())
    PIPELINES["chroma"].make().save_pretrained(tmp_path / "teacher")
    draw_images(tmp_path / "images", 2, 16, 16)
    with pytest.raises(
        UserError, match=r"ChromaTransformer2DModel without blocks? .* would load and compute something"
    ):
        init(tmp_path / "teacher", str(tmp_path / "images"), tmp_path / "r.yaml", 0, None)
    assert not (tmp_path / "r.yaml").exists()


def test_a_transformer_that_cannot_be_asked(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Its configuration says that it reads other captions than the text encoder makes."""
    shutil.copytree(made("pixart") / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"caption_channels": 24}))
    with pytest.raises(UserError, match="cannot be asked"):
        init(tmp_path / "teacher", str(made("pixart") / "images"), tmp_path / "r.yaml", 0, None)


def test_nothing_but_configurations_is_read_of_the_pipeline(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made("wan22") / "teacher", tmp_path / "teacher")
    for path in (tmp_path / "teacher").rglob("*.safetensors"):
        path.unlink()
    init(Path("teacher"), str(made("wan22") / "images"), None, 0, None)
    assert load_recipe(Path("teacher.yaml")).teacher.path == Path("teacher")
