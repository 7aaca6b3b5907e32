"""`ppcl push`: a variant's folder as a repository on the Hugging Face hub, checked before it leaves."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ppcl_ds.atomic import sha256
from ppcl_ds.console import track
from ppcl_ds.errors import UserError, brief
from ppcl_ds.export.card import read_facts
from ppcl_ds.export.model_folder import FACTS, SUMS


def push(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder that `ppcl consolidate` wrote; what is on the hub already is not sent again.

    Args:
        repository: `OWNER/NAME`; is made where it is missing.

    Raises:
        UserError: the folder is no variant's or was changed; or the hub says no.
    """
    if not (folder / FACTS).exists():
        raise UserError(f"{folder}: no folder that ppcl consolidate wrote; it has no {FACTS}")
    facts = read_facts(folder)
    check_sums(folder)
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            folder_path=folder, repo_id=repository, commit_message=f"{facts.variant}, pruned from {facts.teacher}"
        )
    except OfflineModeIsEnabled:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it") from None
    except HFValidationError as fault:
        raise UserError(f"'{repository}' is no name of a repository: {brief(fault)[:200]}") from None
    except (HfHubHTTPError, OSError, ValueError, KeyError) as fault:
        raise UserError(f"{repository}: the hub refused it ({brief(fault)[:200]}); `hf auth login`?") from None
    print(f"pushed {folder} to {done.commit_url}")


def check_sums(folder: Path) -> None:
    """That a folder's files are those that its `SHA256SUMS` lists.

    Raises:
        UserError: one of them is missing or another one.
    """
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    except OSError as fault:
        raise UserError(f"{folder / SUMS}: {fault.strerror}; consolidate again") from None
    for digest, name in track(lines, "check", len(lines)):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; consolidate again")
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: is not what was consolidated; consolidate again")
