"""Measures what is served of every transformer class, and writes it: `python -m tests.families.verdicts`.

Each class is tried with its tiny teachers, or where it has none with its tiny pipelines.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import yaml
from torch import nn

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError
from ppcl_ds.export.lora import numbering
from ppcl_ds.export.single_files import single_file_tensors
from ppcl_ds.teacher.families import ASPECTS, FILE, Verdict, load_verdicts, summary
from ppcl_ds.teacher.flows import arguments_of
from ppcl_ds.teacher.surgery import lay_out, shorten
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.variant import Layout
from tests.families.known import family_of, untried
from tests.families.pipelines import PIPELINES
from tests.families.teachers import TEACHERS, build

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


class _CalledError(BaseException):
    """The transformer was called, with these arguments. No `Exception`, as pipelines catch those."""


def transformer_classes() -> list[str]:
    """Names of all classes of diffusers that are transformers, or answer one."""
    models = {
        name: each
        for name in dir(diffusers)
        if isinstance(each := getattr(diffusers, name), type) and issubclass(each, diffusers.ModelMixin)
    }
    own = [name for name, each in models.items() if "Transformer" in name or ".transformers." in each.__module__]
    return [*own, *(name for name in models if _answered(name, own))]


def _answered(name: str, transformers: Sequence[str]) -> bool:
    """Whether a class is a ControlNet of one of the transformers."""
    family = re.sub(r"(2D)?(Multi)?ControlNetModel$", "", name)
    return family != name and family != "" and any(each.startswith(family) for each in transformers)


def measure(name: str, folder: Path) -> tuple[set[str], dict[str, str]]:
    """What a tiny teacher, or else a tiny pipeline, of this name is served for; and why not, or not for all.

    Args:
        folder: an empty one.
    """
    model: Any
    model, inputs = build(name) if name in TEACHERS else _called(name)
    model.save_pretrained(folder / "teacher")
    teacher = Teacher(folder / "teacher", run=partial(_call, inputs))
    try:
        _ = teacher.blocks
    except UserError as fault:
        return set(), dict.fromkeys(ASPECTS, _in_general(teacher, str(fault)))
    gone, fewer = _taken_out(teacher)
    why = {
        "depth": fewer,
        "text": _text(teacher),
        "ffn": _ffn(teacher, keep=0.0),
        "narrow": _ffn(teacher, keep=0.5),
        "single_file": _single_file(teacher, gone),
        "lora": _lora(teacher, gone, folder),
    }
    served = {aspect for aspect in ASPECTS if not why[aspect]} | ({"depth"} if gone else set())
    return served, {aspect: _in_general(teacher, said) for aspect, said in why.items() if said}


def _in_general(teacher: Teacher, said: str) -> str:
    """A reason without what is of this measurement alone: where its files lay, addresses, which classes are known."""
    said = re.sub(rf"^\w+ {teacher.files.folder.parent}\S*: ", "", said).partition("; known:")[0]
    return re.sub(r"( and mode)? <\S+ object at 0x.*\)$", ")", said)


def _call(inputs: dict[str, Any], model: Any) -> Any:
    return model(**copy.deepcopy(inputs), return_dict=False)


def _called(name: str) -> tuple[Any, dict[str, Any]]:
    """The transformer that a tiny pipeline calls first, and its arguments."""
    family = PIPELINES[name]
    pipe = family.make()
    pipe.set_progress_bar_config(disable=True)

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _CalledError(module, arguments_of(module, args, kwargs))

    for part in _transformers(pipe):
        part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**family.call, num_inference_steps=3, output_type="latent")
    except _CalledError as called:
        model, inputs = called.args
        inputs.pop("return_dict", None)
        model._forward_pre_hooks.clear()
        return model, inputs
    raise AssertionError(f"{name} draws without a transformer")


def _transformers(pipe: Any) -> list[nn.Module]:
    return [part for name, part in pipe.components.items() if "transformer" in name and isinstance(part, nn.Module)]


def _taken_out(teacher: Teacher) -> tuple[range, str]:
    """The fewest blocks that the stock class can do without, and why not fewer: nothing where one can go alone."""
    why = ""
    for first, last in sorted(teacher.plannable_spans, key=lambda span: (span[1] - span[0], span)):
        gone = range(first + 1, last + 1)
        try:
            shorten(teacher, [block.index for block in teacher.blocks if block.index not in gone])
            return gone, "" if len(gone) == 1 else f"not block by block: {why}"
        except UserError as fault:
            why = why or _in_general(teacher, str(fault))
    return range(0), why or teacher.keeps_its_blocks or "no two of its blocks hand on their streams as they are"


def _first(problems: Iterator[str]) -> str:
    """Nothing, where one of the units has no problem; else what is wrong with the first."""
    found = list(problems)
    return "" if "" in found else found[0]


def _text(teacher: Teacher) -> str:
    return _first(
        min((_problem(teacher, "text", (u, u + 1), streams) for streams in (("text",), ())), key=len)
        for u in range(len(teacher.blocks) - 1)
    )


def _ffn(teacher: Teacher, keep: float) -> str:
    return _first(
        _problem(teacher, "ffn", (block.index, block.index), (stream,), keep)
        for block in teacher.blocks
        for stream in block.ffn or ("image",)
    )


def _problem(teacher: Teacher, kind: str, span: tuple[int, int], streams: tuple[str, ...], keep: float = 0.0) -> str:
    unit = UnitPlan(name="unit", kind=kind, span=span, streams=streams, keep=keep)
    return unit.behaviour.problem(unit, teacher)


def _single_file(teacher: Teacher, gone: range) -> str:
    config, tensors = lay_out(teacher, [(block.index, None) for block in teacher.blocks if block.index not in gone])
    try:
        single_file_tensors(Layout(config, tensors, 0))
    except UserError as fault:
        return str(fault).removeprefix("--single-file: ").partition("; this one has")[0]
    return ""


def _lora(teacher: Teacher, gone: range, folder: Path) -> str:
    """A LoRA of all blocks is one of those that stay."""
    span = (gone[0] - 1, gone[-1]) if gone else (0, 0)
    unit = UnitPlan(name="unit", kind="depth" if gone else "ffn", span=span, streams=("image",))
    plan = Plan(teacher=teacher.class_name, blocks=len(teacher.blocks), units=(unit,), variants={"v": ("unit",)})
    plan.save(folder / "plan.yaml")
    try:
        numbers = numbering(folder / "plan.yaml", "v", teacher)
        new = {b.index: numbers.rename(f"transformer.{b.key}.to_q.lora_A.weight").name for b in teacher.blocks}
    except UserError as fault:
        return str(fault)
    left = [index for index, name in new.items() if name is not None]
    assert left == [i for i in range(len(new)) if not gone or not span[0] <= i <= span[1]]
    return ""


def tiny_models() -> dict[str, list[str]]:
    """Transformer class -> names of its tiny teachers, or else of its tiny pipelines that need no more packages."""
    found: dict[str, list[str]] = {}
    for name, teacher in TEACHERS.items():
        found.setdefault(teacher.class_name, []).append(name)
    drawn: dict[str, list[str]] = {}
    for name, family in PIPELINES.items():
        for each in {type(part).__name__ for part in _transformers(family.make())} if not family.needs else ():
            drawn.setdefault(each, []).append(name)
    return drawn | found


def verdict_on(class_name: str, names: Sequence[str]) -> Verdict:
    """What a class is served for, by its tiny models of these names."""
    if not names:
        return Verdict(family_of(class_name), why={"all": untried(class_name)})
    served: set[str] = set()
    why: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            also, but = measure(name, Path(folder))
        served, why = served | also, but | why
    if not served and len(set(why.values())) == 1:
        return Verdict(family_of(class_name), list(names), why={"all": why["depth"]})
    ordered = {aspect: why[aspect] for aspect in ASPECTS if aspect in why}
    return Verdict(family_of(class_name), list(names), [aspect for aspect in ASPECTS if aspect in served], ordered)


_ABOUT = """\
# What is served of each transformer class of diffusers; `ppcl families` and docs/families.md show it.
# Measured and written by `python -m tests.families.verdicts`; do not edit.
"""


class _File(yaml.SafeDumper):
    """Writes a list on one line."""


_File.add_representer(
    list, lambda file, items: file.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def as_yaml(verdicts: Mapping[str, Verdict]) -> str:
    """The file that ships with the package: by family, then by class."""
    order = sorted(verdicts, key=lambda name: (verdicts[name].family.casefold(), name))
    content = {name: {key: value for key, value in vars(verdicts[name]).items() if value} for name in order}
    return _ABOUT + yaml.dump(content, Dumper=_File, sort_keys=False, allow_unicode=True, width=10_000)


def as_markdown(verdicts: Mapping[str, Verdict]) -> str:
    """The table of docs/families.md."""
    rows: list[Iterable[str]] = [("family", "class", *ASPECTS.values()), ["---"] * (2 + len(ASPECTS))]
    rows += [(each.family, f"`{name}`", *map(each.cell, ASPECTS)) for name, each in verdicts.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{summary(verdicts)}.\n"


def with_table(page: str, table: str) -> str:
    """A page with another table between its two markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Measure everything and write it."""
    models = tiny_models()
    verdicts = {name: verdict_on(name, models.get(name, ())) for name in transformer_classes()}
    atomic_write(FILE, as_yaml(verdicts).encode())
    atomic_write(DOCS, with_table(DOCS.read_text(), as_markdown(load_verdicts())).encode())
    print(summary(verdicts))


if __name__ == "__main__":
    main()
