"""What every part asks of its arguments."""

from __future__ import annotations

from collections.abc import Iterable


def whole(name: str, value: int, least: int = 1, remedy: str = "") -> int:
    """value, if it is an integer of at least ``least``; otherwise a ValueError of one line, ending in ``remedy``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}" + (f"; {remedy}" if remedy else ""))
    return value


def one_of(name: str, value: str, known: Iterable[str], remedy: str = "") -> str:
    """value, if it is known; otherwise a ValueError of one line, ending in ``remedy``."""
    known = list(known)
    if value not in known:
        raise ValueError(
            f"{name}: expected one of {', '.join(known)}, got {value!r}" + (f"; {remedy}" if remedy else "")
        )
    return value
