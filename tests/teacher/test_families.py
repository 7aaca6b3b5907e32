"""`ppcl families`: a row a class, the reasons of those that were asked for, how many are served."""

from __future__ import annotations

from tests.conftest import command

WORDS = {"yes", "partly", "no", "-"}


def row(printed: str, class_name: str) -> str:
    """What stands behind a class in the table."""
    [words] = [words for words in rows(printed) if class_name in words]
    return " ".join(words[-6:])


def rows(printed: str) -> list[list[str]]:
    """The words of each row of the table."""
    return [words for line in printed.splitlines() if (words := line.split()) and set(words[-6:]) <= WORDS]


def test_the_table_has_every_class_and_ends_with_their_number() -> None:
    printed = command("families")
    assert row(printed, "FluxTransformer2DModel") == "yes yes yes yes yes yes"
    assert row(printed, "WanTransformer3DModel").startswith("yes no yes yes yes")
    assert row(printed, "LatteTransformer3DModel") == "no no no no no no"
    assert row(printed, "FluxControlNetModel") == "- - - - - -"
    served = sum(words[-6] in ("yes", "partly") for words in rows(printed))
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"{len(rows(printed))} transformer classes, ")
    assert f"served for: depth {served}, text " in last


def test_a_part_of_a_name_gives_its_rows_and_why_not() -> None:
    printed = command("families", "CONSISID")
    assert row(printed, "ConsisIDTransformer3DModel").startswith("no no yes yes no ")
    [reason] = [line for line in printed.splitlines() if line.startswith("ConsisIDTransformer3DModel, depth: ")]
    assert "ties something to the numbers of its blocks" in reason
    assert printed.strip().splitlines()[-1].startswith("1 transformer classes")
    by_family = command("families", "flux.2")
    assert "Flux2Transformer2DModel" in by_family
    assert "FluxTransformer2DModel" not in by_family


def test_a_reason_that_several_things_have_is_said_once() -> None:
    lines = command("families", "HunyuanDiT2DControlNetModel").strip().splitlines()
    assert [line for line in lines if line.startswith("Hunyuan")][-1].endswith(
        "all: no teacher by itself: it answers another transformer"
    )
    sana = [line for line in command("families", "SanaTransformer").splitlines() if "convolutional" in line]
    assert len(sana) == 1
    assert sana[0].startswith("SanaTransformer2DModel, ffn, narrow: ")


def test_a_name_that_there_is_not() -> None:
    assert command("families", "nonesuch", code=2).strip() == (
        "error: no transformer class or family of diffusers is called 'nonesuch'; `ppcl families` lists all"
    )
