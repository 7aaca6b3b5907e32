"""README and the documentation site: every command that they show is one, and their roads are walked as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import data_tools.cli
import ppcl_ds.cli
from tests.clips import long_enough
from tests.conftest import WORDS
from tests.families.test_call import made
from tests.start.test_init import draw_images

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TOOLS: dict[str, Any] = {"ppcl": get_command(ppcl_ds.cli.app), "ppcl-data": get_command(data_tools.cli.app)}


def blocks(page: Path, road: str = "") -> list[str]:
    """The fenced blocks of commands of a page: all of them, or those of a road that it names, in order."""
    fence = rf"bash {road} \S+" if road else r"(?:bash(?: \S+)*)?"
    return re.findall(rf"^```{fence}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """What is called on a page of our commands, as words without their comments."""
    text = "\n".join(blocks(page)).replace("\\\n", " ") + "\n".join(
        re.findall(r"`(ppcl(?:-data)? [a-z][^`\n]*)`", page.read_text())
    )
    found = []
    for line in text.splitlines():
        line = re.sub(r"^torchrun .*ppcl_ds\.cli", "ppcl", line)
        if re.match(r"ppcl(-data)? ", line):
            found.append(shlex.split(line, comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_is_one(page: Path) -> None:
    for words in commands(page):
        command, context, rest = TOOLS[words[0]], None, words[1:]
        while hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
            context = command.make_context(words[0], [], resilient_parsing=True)
            for each in rest[0].split("|"):  # `ppcl init|demo`
                assert command.get_command(context, each), f"{' '.join(words)}: {each} is no command"
            command, rest = command.get_command(context, rest[0].split("|")[0]), rest[1:]
        context = command.make_context(words[0], [], resilient_parsing=True)
        context.resilient_parsing = False  # which had it made without arguments
        command.make_parser(context).parse_args([*rest, "X"])  # prose names options without their values


def test_a_slip_on_a_page_is_noticed(tmp_path: Path) -> None:
    for slip in ("ppcl distil RECIPE", "ppcl distill RECIPE --dryrun", "ppcl-data encod RECIPE"):
        (tmp_path / "page.md").write_text(f"```\n{slip}  # trains\n```\n")
        with pytest.raises(Exception, match=r"distil|dryrun|encod"):
            test_every_command_on_a_page_is_one(tmp_path / "page.md")


def shorten(path: Path, call: Mapping[str, Any]) -> None:
    """A recipe as `ppcl init` writes it, with a handful of steps, and with its section `finetune` where it has one.

    Args:
        call: what the tiny pipeline is asked for: height, width and frames.
    """
    recipe = yaml.safe_load(re.sub(r"^# (finetune:|  )", r"\1", path.read_text(), flags=re.MULTILINE))
    for name in ("distill", "finetune"):
        recipe[name] |= {"steps": 2, "log_every": 1, "sample_every": 0, "checkpoint_every": 2}
        recipe[name] |= {"micro_batch": 1, "micro_batches_per_step": 2}
        recipe[name]["optimizer"] |= {"warmup_steps": 0}
    if recipe["distill"].get("trajectories"):
        recipe["distill"]["trajectories"] |= {"steps": [2, 4]}
        recipe["finetune"] = None
    if recipe["data"].get("sizes"):
        recipe["data"]["sizes"] = {"x".join(str(call[key]) for key in ("height", "width", "num_frames")): 1}
    recipe["probe"] = {"batch_size": 1, "batches": 4}
    recipe["evaluate"] |= {"samples": 2, "batch_size": 1, "steps": 2, "velocity_batches": 2, "few_steps": 2}
    recipe["plan"]["prompts"] = 2
    path.write_text(yaml.safe_dump(recipe))


def walk(folder: Path, lines: str) -> None:
    """Run the lines of a block in a folder, as somebody types them whose environment is the one of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    ("page", "pipeline", "folder"), [("qwen_image", "qwen_image", "Qwen-Image"), ("wan", "wan", "Wan2.1-T2V")]
)
def test_a_road_is_walked_as_its_page_says(page: str, pipeline: str, folder: str, tmp_path: Path) -> None:
    """A tiny pipeline of the same classes stands for the teacher, a few steps for thousands, few pixels for a clip."""
    family, pipe = made(pipeline)
    smaller = {"--gpus 8 --gpu-memory 80": "--gpus 0"}
    if "num_frames" in family.call:
        smaller["--out cat.png"] = f"--out cat.png --steps 2 --size {family.call['height']}"
        long_enough(pipe)
    pipe.save_pretrained(tmp_path / "models" / folder)
    draw_images(tmp_path / "my_images", 24, int(family.call["height"]), int(family.call["width"]))
    (tmp_path / "captions.txt").write_text("".join(f"a tiny {WORDS[number % 4]}\n" for number in range(24)))
    recipe = tmp_path / f"{page.partition('_')[0]}.yaml"
    shortened = False
    for lines in blocks(REPOSITORY / "docs" / f"{page}.md", page):
        for said, small in smaller.items():
            lines = lines.replace(said, small)
        walk(tmp_path, lines)
        if recipe.exists() and not shortened:
            shorten(recipe, family.call)
            shortened = True
    pruned = tmp_path / "runs" / recipe.stem / "pruned" / "small"
    assert (pruned / "model_index.json").exists()
    assert (tmp_path / "cat.png").stat().st_size > 0
