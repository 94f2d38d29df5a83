"""What fits may raise beside ValueError and TypeError, and how an exception of others' code is told in one line."""

from __future__ import annotations

LONGEST_LINE = 200  # characters of such a line


class DivergedError(RuntimeError):
    """Training met non-finite values again after its learning rate was halved three times."""


def first_line(error: BaseException, kind: bool = True) -> str:
    """The first line of an exception's message, with its type before it if ``kind``; its type where it has no message.

    A line that ends in a colon takes the next one with it: Pyro puts the cause below "Error while ... at site 'y':".
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (f"{type(error).__name__}: {line}" if kind else line)[:LONGEST_LINE]
