"""The public conformance suite: what a flow or a target must satisfy, for a user's own tests."""

from .flow import check_flow
from .target import check_target

__all__ = ["check_flow", "check_target"]
