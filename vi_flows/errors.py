"""What fits may raise beside ValueError and TypeError."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """Training met non-finite values again after its learning rate was halved three times."""
