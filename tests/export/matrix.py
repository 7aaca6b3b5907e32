"""What the tests try of each family, format and tool, for docs/exports.md: `python -m tests.export.matrix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ppcl_ds.atomic import atomic_write
from ppcl_ds.export.names import load_names
from ppcl_ds.teacher.families import load_verdicts
from tests.export.test_comfyui import CASES, WIDER
from tests.export.test_gguf import MODELS
from tests.export.test_names import CONVERTERS
from tests.export.test_sd_cpp import DRAWN
from tests.families.teachers import TEACHERS
from tests.families.verdicts import with_table

PAGE = Path(__file__).parents[2] / "docs" / "exports.md"
VERSIONS = """\
diffusers 0.42.1, ComfyUI 0.30.0, gguf 0.19.0; stable-diffusion.cpp of its Python package 0.4.7, and of August 2026 for
what is only written."""


def table() -> str:
    """The table and the versions, in Markdown."""
    converted = {TEACHERS[name].class_name for name in CONVERTERS if name in TEACHERS}
    converted.add("QwenImageTransformer2DModel")
    drawn = {case.class_name for case in CASES.values()}
    scaled = {CASES[name].class_name for name in WIDER}
    ggufs = {class_name for class_name, _, _ in MODELS.values()}
    rows = [
        "| family | single file: diffusers | ComfyUI | ComfyUI fp8, int8 | stable-diffusion.cpp | GGUF: diffusers |",
        "|---|---|---|---|---|---|",
    ]
    verdicts = load_verdicts()
    for class_name, names in load_names().items():
        if not names.names:
            rows.append(f"| {verdicts[class_name].family} | - | refused | refused | - | - |")
            continue
        refused = dict.fromkeys(names.taken, "refused") | dict.fromkeys(names.lack, "-")
        if isinstance(limit := next(iter(names.taken.get("sd.cpp", {}).values()), None), Mapping):
            refused["sd.cpp"] = f"written; refused with `{next(iter(limit))}`"
        if class_name in drawn and isinstance(names.taken.get("comfyui", {}).get("num_layers"), str):
            refused["comfyui"] = "refused; drawn with all its blocks"
        cells = (
            verdicts[class_name].family,
            "loaded" if class_name in converted else "-",
            refused.get("comfyui", "drawn" if class_name in drawn else "written"),
            refused.get("comfyui", "drawn" if class_name in scaled else "written").partition(";")[0],
            refused.get("sd.cpp", "drawn" if class_name in DRAWN else "written"),
            ("drawn" if class_name in ggufs else "written") + "; stable-diffusion.cpp: drawn" * (class_name in DRAWN),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\n{VERSIONS}\n"


def main() -> None:
    """Write the table into the page."""
    atomic_write(PAGE, with_table(PAGE.read_text(), table()).encode())
    print(table())


if __name__ == "__main__":
    main()
