"""vi_flows: variational inference and Bayesian sampling with normalizing flows, and a verdict on every fit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import flows, testing
from .errors import DivergedError
from .fitting.diagnose import diagnose
from .fitting.fit import fit
from .fitting.posterior import Posterior, load
from .flows import bases, recipes
from .flows.distribution import Flow, FlowDistribution, NotConverged
from .guides import AutoFlow
from .inference.estimate.weights import log_weights
from .inference.judge.check import Verdict
from .targets import Energy, LogDensity, PyroModel, Target, catalogue
from .version import __version__

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
    "__version__",
    "bases",
    "catalogue",
    "diagnose",
    "fit",
    "flows",
    "load",
    "log_weights",
    "recipes",
    "testing",
]

LAZY = ("report", "vae")  # imported when they are first named: report brings matplotlib along


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
