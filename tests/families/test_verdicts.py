"""What ships as measured is what is measured: the file, the table of docs/families.md; no class is left out."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from ppcl_ds.teacher.families import ASPECTS, FILE, Verdict, load_verdicts
from tests.families.core import CORE
from tests.families.pipelines import PIPELINES
from tests.families.teachers import TEACHERS
from tests.families.verdicts import (
    DOCS,
    as_markdown,
    as_yaml,
    tiny_models,
    transformer_classes,
    verdict_on,
    with_table,
)

VERDICTS = load_verdicts()


def cases() -> list[Any]:
    """The classes that were tried; in the ordinary suite, those of the core families."""
    return [
        pytest.param(name, marks=() if CORE & set(each.tried) else pytest.mark.families)
        for name, each in VERDICTS.items()
        if each.tried and hasattr(diffusers, name)
    ]


@pytest.mark.parametrize("class_name", cases())
def test_a_verdict_is_what_is_measured(class_name: str) -> None:
    shipped = VERDICTS[class_name]
    assert verdict_on(class_name, shipped.tried) == shipped, "write it anew: python -m tests.families.verdicts"


@pytest.mark.families
def test_every_tiny_model_has_been_measured() -> None:
    assert {name: sorted(each.tried) for name, each in VERDICTS.items() if each.tried and hasattr(diffusers, name)} == {
        name: sorted(models) for name, models in tiny_models().items()
    }


def test_every_tiny_teacher_has_been_measured() -> None:
    tried = {model for each in VERDICTS.values() for model in each.tried}
    assert set(TEACHERS) <= tried
    assert all(model in TEACHERS or not PIPELINES[model].needs for model in tried & {*TEACHERS, *PIPELINES})


def test_every_transformer_of_diffusers_has_a_verdict_and_a_reason() -> None:
    assert set(transformer_classes()) <= set(VERDICTS)
    assert len(VERDICTS) >= 75
    assert sum("depth" in each.served for each in VERDICTS.values()) >= 55
    for name, each in VERDICTS.items():
        assert set(each.served) | set(each.why) >= set(ASPECTS) or set(each.why) == {"all"}, name


def test_the_file_and_the_page_are_written_from_the_verdicts() -> None:
    assert FILE.read_text() == as_yaml(VERDICTS)
    page = DOCS.read_text()
    assert with_table(page, as_markdown(VERDICTS)) == page


def test_a_class_without_a_tiny_model_says_why() -> None:
    assert "answers another transformer" in verdict_on("FluxControlNetModel", ()).why["all"]
    unknown = verdict_on("NewTransformer3DModel", ())
    assert unknown == Verdict("New", why={"all": "nobody has tried it"})
