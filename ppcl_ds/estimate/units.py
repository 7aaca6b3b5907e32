"""Numbers as people read them: bytes, operations, times, counts."""

from __future__ import annotations

from rich.filesize import pick_unit_and_suffix

_BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
_FLOPS = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"]
_TIMES = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def sized(size: float) -> str:
    """Bytes: `1.5 GiB`."""
    unit, suffix = pick_unit_and_suffix(int(size), _BYTES, 1024)
    return f"{int(size)} B" if unit == 1 else f"{size / unit:.1f} {suffix}"


def computed(flops: float) -> str:
    """Operations: `219 PFLOP`."""
    unit, suffix = pick_unit_and_suffix(int(flops), _FLOPS, 1000)
    return f"{_three(flops / unit)} {suffix}"


def counted(number: float) -> str:
    """A count: `20.4 B`."""
    unit, suffix = pick_unit_and_suffix(int(number), ["", " k", " M", " B", " T"], 1000)
    return f"{_three(number / unit)}{suffix}"


def lasting(seconds: float) -> str:
    """A time: `3.65 h`, `12 ms`."""
    length, name = next((each for each in _TIMES if seconds >= each[0]), _TIMES[-1])
    return f"{_three(seconds / length)} {name}" if seconds else "0 s"


def priced(cost: float) -> str:
    """Money, in whatever the price was in: `0.05`, `57.6`, `1234`."""
    return f"{cost:.2f}" if cost < 10 else _three(cost)


def _three(number: float) -> str:
    """Three digits, never with an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
