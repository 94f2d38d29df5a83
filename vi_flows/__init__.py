"""vi_flows: variational inference and Bayesian sampling with normalizing flows, and a verdict on every fit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import testing
from .flows import bases, recipes
from .flows.distribution import Flow, FlowDistribution, NotConverged
from .guides import AutoFlow
from .inference.checkpoint import load
from .inference.diagnose import diagnose
from .inference.fit import fit
from .inference.judge import Verdict
from .inference.posterior import Posterior
from .inference.training import DivergedError
from .inference.weights import log_weights
from .targets import Energy, LogDensity, PyroModel, Target, catalogue

if TYPE_CHECKING:
    from . import report as report
    from . import vae as vae

__all__ = [
    "AutoFlow",
    "DivergedError",
    "Energy",
    "Flow",
    "FlowDistribution",
    "LogDensity",
    "NotConverged",
    "Posterior",
    "PyroModel",
    "Target",
    "Verdict",
    "bases",
    "catalogue",
    "diagnose",
    "fit",
    "load",
    "log_weights",
    "recipes",
    "testing",
]

__version__ = "0.1.0"

LAZY = ("report", "vae")  # imported when they are first named: report brings matplotlib along


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
