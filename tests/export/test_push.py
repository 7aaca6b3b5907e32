"""`ppcl push` against a server that answers as the Hugging Face hub does, by huggingface_hub's own requests."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.export.card import Facts, write_card
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.model_folder import weights_digest
from ppcl_ds.export.push import push
from tests.export.trained import pretend_trained
from tests.local_hub import LocalAnswers, LocalHub


class Hub(LocalHub):
    """Knows one account, whose token is `hf_right`."""

    def __init__(self) -> None:
        super().__init__(Answers)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}


class Answers(LocalAnswers, BaseHTTPRequestHandler):  # named again, as its methods are called as it wants
    server: Hub

    def says(self, content: Any, code: int = 200) -> None:
        self.answer(json.dumps(content).encode(), code, Content_Type="application/json")

    def do_GET(self) -> None:
        self.says({"error": "Repository not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_right":
            self.says({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.says({"url": f"{self.server.url}/owner/small", "name": "owner/small"})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self.says({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.says({"commitUrl": f"{self.server.url}/owner/small/commit/1", "commitOid": "1", "success": True})
        else:
            self.says({"valid": True, "message": "", "warnings": [], "errors": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


@pytest.fixture
def folder(new_run: Callable[..., Path]) -> Path:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    consolidate(recipe, ["small"], Form())
    return recipe.pruned("small").parent


def pushed(folder: Path, hub: Hub, token: str, code: int = 0, name: str = "owner/small") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_ds.cli", "push", folder, name, "--private"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_folder_arrives_as_it_is(folder: Path, hub: Hub) -> None:
    assert "/owner/small/commit/1" in pushed(folder, hub, "hf_right")
    assert hub.made[0]["name"] == "small"
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"  # by the release of the client
    own = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == own
    refused = pushed(folder, hub, "hf_wrong", code=2)
    assert "the hub refused it" in refused.splitlines()[-1]
    assert "Traceback" not in refused


def test_what_is_not_as_it_was_consolidated_is_not_sent(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder that ppcl consolidate wrote; it has no variant\.json"):
        push(tmp_path, "owner/small", False)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"config\.json: is not what was consolidated"):
        push(folder, "owner/small", False)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json: is missing"):
        push(folder, "owner/small", False)


def test_a_licence_that_restricts_is_passed_on_with_a_warning(folder: Path) -> None:
    facts = Facts.model_validate_json((folder / "variant.json").read_bytes())
    terms = {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "teacher": "someone/FLUX.1-dev"}
    (folder / "variant.json").write_text(facts.model_copy(update=terms).model_dump_json())
    write_card(folder, [])
    card = (folder / "README.md").read_text()
    assert "license_name: flux-1-dev-non-commercial-license\n" in card
    assert "base_model: someone/FLUX.1-dev\nbase_model_relation: finetune\n" in card
    assert "may forbid commercial use" in card
    (folder / "variant.json").write_text(facts.model_copy(update={"license": "apache-2.0"}).model_dump_json())
    write_card(folder, [])
    assert "may forbid" not in (folder / "README.md").read_text()


def test_the_card_of_a_pruned_qwen_image_has_the_papers_own_figures(folder: Path) -> None:
    facts = Facts.model_validate_json((folder / "variant.json").read_bytes())
    figures = {"params": 1, "block_params_ratio": 0.5, "latency_ms": 1.0, "accuracy": None, "frechet": None}
    row = {"name": facts.variant, "weights": weights_digest(folder), **figures}
    scores = [{"score": "psnr", "values": {facts.variant: 30.0}, "differences": {}}]
    official = {"teacher": {"overall": 87.0}, facts.variant: {"overall": 85.0}}
    settings = {"size": [64, 64], "steps": 4, "guidance": 4.0}
    own = {"name": "dpg", "prompts": 4, "per_prompt": 4, "settings": settings, "scores": scores, "official": official}
    for blocks, said in ((60, True), (facts.teacher_blocks, False)):
        changes = {"teacher_blocks": blocks, "model_class": "QwenImageTransformer2DModel"}
        (folder / "variant.json").write_text(facts.model_copy(update=changes).model_dump_json())
        write_card(folder, [row], [own])
        card = (folder / "README.md").read_text()
        assert "own overall: 85\n" in card
        assert ("\n\nThe paper's own models of Qwen-Image lose 0.4 %" in card) == said
