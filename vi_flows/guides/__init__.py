"""Flows as Pyro guides, and how any guide is scored."""

from .auto_flow import AutoFlow

__all__ = ["AutoFlow", "scoring"]
