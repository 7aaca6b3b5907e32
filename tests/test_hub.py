"""Ids of the Hugging Face hub, against a server that answers as the hub does to huggingface_hub's own requests."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.hub import is_id, pipeline_folder
from tests.local_hub import LocalAnswers, LocalHub

SHA = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = {
    "model_index.json": json.dumps(
        {
            "_class_name": "TinyPipeline",
            "transformer": ["diffusers", "Tiny"],
            "vae": ["diffusers", "Tiny"],
            "extra": [None, None],
        }
    ),
    "README.md": "---\nlicense: mit\n---\n",
    "LICENSE.md": "MIT",
    "tiny.safetensors": "one file for other tools",
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model.safetensors": "weights",
    "transformer/diffusion_pytorch_model.fp16.safetensors": "half of them",
    "transformer/diffusion_pytorch_model.bin": "pickled",
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.bin": "pickled alone",
    "text_encoders/other.safetensors": "of another tool",
}
NEEDED = {
    "model_index.json",
    "README.md",
    "LICENSE.md",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
}
DATA = {"README.md": "", "data/a.png": "picture", "data/a.txt": "a cat", "preview.gguf": "no"}
REPOSITORIES = {"models/owner/tiny": PIPELINE, "datasets/owner/cats": DATA, "models/owner/bare": {"README.md": ""}}


class Hub(LocalHub):
    """Has a pipeline and a data set; `models/owner/gated` asks for consent."""

    def __init__(self) -> None:
        super().__init__(Answers)
        self.asked: list[str] = []


class Answers(LocalAnswers, BaseHTTPRequestHandler):  # named again, as its methods are called as it wants
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        if path.startswith("api/models/owner/gated"):
            self.answer(b"{}", 403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            return
        for name, files in REPOSITORIES.items():
            if path in (f"api/{name}", f"api/{name}/revision/{SHA}", f"api/{name}/revision/main"):
                siblings = [{"rfilename": file, "size": len(text)} for file, text in files.items()]
                found = {"id": name.partition("/")[2], "sha": SHA, "siblings": siblings, "tags": [], "downloads": 0}
                self.answer(
                    json.dumps(found | {"likes": 0, "private": False}).encode(), Content_Type="application/json"
                )
                return
            if path.startswith(f"api/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(text), "oid": hashlib.sha1(text.encode()).hexdigest()}
                    for file, text in files.items()
                ]
                self.answer(json.dumps(tree).encode(), Content_Type="application/json")
                return
            for file, text in files.items():
                if path in (f"{name.removeprefix('models/')}/resolve/{at}/{file}" for at in (SHA, "main")):
                    etag = hashlib.sha1(text.encode()).hexdigest()
                    self.answer(text.encode(), X_Repo_Commit=SHA, ETag=f'"{etag}"')
                    return
        self.answer(b"{}", 404, X_Error_Code="RepoNotFound")


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


def asked(code: str, address: str, home: Path, offline: bool = False) -> str:
    """What code prints that runs with another hub, in a folder of its own."""
    program = (
        "from ppcl_ds.errors import UserError\nfrom ppcl_ds.hub import *\n"
        f"try:\n    print({code})\nexcept UserError as fault:\n    print('error:', fault)"
    )
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": str(int(offline))}
    own |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=home, env=os.environ | own
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MODEL = "pipeline_folder(Path('owner/tiny'))"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_a_pipeline_only_what_it_is_made_of_is_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    folder = Path(asked(MODEL, hub.url, tmp_path))
    assert files_in(folder) == NEEDED
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_text() == "weights"
    before = len(hub.asked)
    assert asked(MODEL, hub.url, tmp_path) == asked(MODEL, hub.url, tmp_path, offline=True) == str(folder)
    assert len(hub.asked) == before  # the cache has it
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    assert asked(MODEL, hub.url, tmp_path) == str(folder)  # what an interruption left out is fetched
    assert files_in(folder) == NEEDED


def test_of_a_data_set_only_what_is_read_is_fetched(hub: Hub, tmp_path: Path) -> None:
    code = "data_folder('owner/cats', ('.png', '.txt'))"
    folder = Path(asked(code, hub.url, tmp_path))
    assert files_in(folder) == {"data/a.png", "data/a.txt"}
    assert asked(code, hub.url, tmp_path, offline=True) == str(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/none", "owner/none: no such file or folder, seen from {here}; nor has {hub} such a model"),
        ("owner/gated", "teacher owner/gated: its owner on {hub} asks for consent"),
        ("owner/bare", "owner/bare: the hub's repository has no model_index.json"),
    ],
)
def test_what_the_hub_has_not_is_one_line(hub: Hub, tmp_path: Path, name: str, message: str) -> None:
    said = asked(f"pipeline_folder(Path('{name}'))", hub.url, tmp_path)
    assert said.startswith("error: ")
    assert message.format(here=tmp_path, hub=hub.url) in said


def test_without_a_network_one_line_says_what_to_do_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    began = time.monotonic()
    for code, option in ((MODEL, ""), ("data_folder('owner/cats', ('.png',))", " --repo-type dataset")):
        said = asked(code, address, tmp_path)
        assert f"no such file or folder, seen from {tmp_path}; it is not in the cache of {address}" in said
        name = "owner/cats" if option else "owner/tiny"
        assert said.endswith(f"copy the folder here, or run `hf download {name}{option}` where there is a network")
    assert time.monotonic() - began < 60  # no storm of retries, which the client's own would be


def test_a_missing_folder_is_told_from_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_id("Qwen/Qwen-Image")
    (tmp_path / "models").mkdir()
    for path in ("models/Qwen-Image", "/models/Qwen-Image", "../Qwen/x", "a/b/c", "alone", "~/x", "images/"):
        assert not is_id(path)
    with pytest.raises(UserError, match=f"teacher models/Qwen-Image: no such file or folder, seen from {tmp_path}$"):
        pipeline_folder(Path("models/Qwen-Image"))
    (tmp_path / "models" / "here").mkdir()
    assert pipeline_folder(Path("models/here")) == Path("models/here")
