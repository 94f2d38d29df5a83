"""Targets: what is approximated, as a log density on R^D, and how its points become named values."""

from . import catalogue
from .check import CheckReport, check_target, settle_dtype
from .pyro_model import PyroModel
from .target import Energy, LogDensity, Target, check_finite, resolve_target

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
