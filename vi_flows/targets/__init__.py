"""Targets: what is approximated, as a log density on R^D, and how its points become named values."""

from . import catalogue
from .check import CheckReport, check_target, settle_dtype
from .density import Energy, LogDensity
from .pyro_model import PyroModel
from .resolve import resolve_target
from .target import Target
from .values import check_finite

__all__ = [
    "CheckReport",
    "Energy",
    "LogDensity",
    "PyroModel",
    "Target",
    "catalogue",
    "check_finite",
    "check_target",
    "resolve_target",
    "settle_dtype",
]
