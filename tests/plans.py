"""Plans for the tiny teachers that several tests share; what one test alone needs stands there."""

from __future__ import annotations

from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.spec import Stream
from tests.conftest import TEACHERS

BLOCKS = {"qwen": 6, "flux": 9, "sd3": 6}
BOTH: tuple[Stream, ...] = ("image", "text")

SPANS = {
    "qwen": {"early": (0, 2), "inner": (1, 2), "late": (3, 4)},
    "flux": {"early": (0, 1), "inner": (1, 2), "late": (5, 7)},
    "sd3": {"early": (0, 2), "inner": (1, 2), "late": (3, 4)},
}
"""Family -> unit -> span; `early` and `inner` overlap."""


def image_spans(family: str) -> Plan:
    """`SPANS`, and a variant `small` that plugs `early` and `late`."""
    units = tuple(UnitPlan(name=name, span=span, streams=("image",)) for name, span in SPANS[family].items())
    return _plan(family, units, {"small": ("early", "late"), "medium": ("inner",)})


def three_spans() -> Plan:
    """Depth units of Qwen-Image, two of which overlap."""
    units = (
        UnitPlan(name="early", span=(0, 2), streams=BOTH),
        UnitPlan(name="middle", span=(1, 3), streams=BOTH),
        UnitPlan(name="late", span=(4, 5), streams=("image",)),
    )
    return _plan("qwen", units, {"small": ("early", "late")})


def ten_spans() -> Plan:
    """Depth units of Qwen-Image, one of which two variants share."""
    spans = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)]
    units = tuple(UnitPlan(name=f"unit_{u}_{v}", span=(u, v), streams=("image",) if v == 5 else BOTH) for u, v in spans)
    variants = {"a": ("unit_0_1", "unit_2_4"), "b": ("unit_2_4",), "c": ("unit_0_3", "unit_4_5")}
    return _plan("qwen", units, variants)


def every_kind(family: str) -> Plan:
    """Units of every kind; the last block of a single list closes a text group where there is one list."""
    units = [
        UnitPlan(name="span", span=(0, 1), streams=BOTH),
        UnitPlan(name="group", kind="text", span=(1, 3), streams=("text",)),
        UnitPlan(name="line", kind="ffn", span=(2, 2), streams=("image",)),
        UnitPlan(name="thin", kind="ffn", span=(0, 0), streams=BOTH, keep=0.25),
    ]
    variants = {"group": ("group",), "ffn": ("line", "thin"), "mixed": ("group", "line", "thin")}
    if family == "flux":
        variants["deep"] = ("span", "line", "single")
        units.append(UnitPlan(name="single", span=(5, 7), streams=BOTH))
    else:
        variants["deep"] = ("span", "line", "end")
        units.append(UnitPlan(name="end", kind="text", span=(4, 5), streams=()))
    return _plan(family, tuple(units), variants)


LINE = UnitPlan(name="line", kind="ffn", span=(2, 2), streams=("image",))
THIN = UnitPlan(name="thin", kind="ffn", span=(0, 0), streams=BOTH, keep=0.25)
SMALL = {
    "qwen": (UnitPlan(name="early", span=(1, 2), streams=BOTH),),
    "flux": (
        UnitPlan(name="double", span=(1, 2), streams=BOTH),
        UnitPlan(name="single", span=(5, 7), streams=BOTH),
    ),
    "sd3": (),
}
MIXED = {
    "qwen": (
        THIN,
        UnitPlan(name="group", kind="text", span=(1, 2), streams=("text",)),
        LINE,
        UnitPlan(name="late", span=(3, 4), streams=BOTH),
    ),
    "flux": (
        UnitPlan(name="start", span=(0, 1), streams=BOTH),
        UnitPlan(name="group", kind="text", span=(2, 3), streams=("text",)),
        LINE,
        UnitPlan(name="late", span=(4, 6), streams=BOTH),
    ),
    "sd3": (
        UnitPlan(name="start", span=(0, 1), streams=BOTH),
        LINE,
        UnitPlan(name="end", kind="text", span=(3, 5), streams=()),
    ),
}


def small_and_mixed(family: str) -> Plan:
    """`small` plugs depth units, `mixed` units of every kind."""
    chosen = {name: units for name, units in (("small", SMALL[family]), ("mixed", MIXED[family])) if units}
    variants = {name: tuple(unit.name for unit in units) for name, units in chosen.items()}
    return _plan(family, sum(chosen.values(), ()), variants)


def _plan(family: str, units: tuple[UnitPlan, ...], variants: dict[str, tuple[str, ...]]) -> Plan:
    return Plan(teacher=TEACHERS[family][0], blocks=BLOCKS[family], units=units, variants=variants)
