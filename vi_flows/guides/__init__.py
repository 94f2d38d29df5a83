"""Flows as Pyro guides, and how any guide is scored."""

from . import scoring  # registers how guides are scored
from .auto_flow import AutoFlow

__all__ = ["AutoFlow", "scoring"]
