"""vi_flows: variational inference and Bayesian sampling with normalizing flows, and a verdict on every fit."""

from . import testing
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
    "load",
    "log_weights",
    "recipes",
    "testing",
]
