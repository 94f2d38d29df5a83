"""How exceptions are told in a line."""

import pytest

from vi_flows.errors import LONGEST_LINE, first_line


@pytest.mark.parametrize(
    ("error", "with_kind", "without"),
    [
        (ValueError("bad\nmore"), "ValueError: bad", "bad"),
        (ValueError("  \n"), "ValueError", "ValueError"),
        (RuntimeError("site 'y':\ntoo small\nmore"), "RuntimeError: site 'y': too small", "site 'y': too small"),
        (SystemExit(3), "SystemExit: 3", "3"),
    ],
)
def test_first_line(error, with_kind, without):
    assert first_line(error) == with_kind and first_line(error, kind=False) == without


def test_first_line_is_cut():
    assert len(first_line(ValueError("x" * 1000))) == LONGEST_LINE
