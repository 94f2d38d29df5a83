"""How an exception that somebody else's code raised is told in a message of ours."""

from __future__ import annotations

LONGEST = 200  # characters


def first_line(error: BaseException, kind: bool = True) -> str:
    """The first line of an exception's message, with its type before it if ``kind``; its type where it has no message.

    A line that ends in a colon takes the next one with it: Pyro puts the cause below "Error while ... at site 'y':".
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (f"{type(error).__name__}: {line}" if kind else line)[:LONGEST]
