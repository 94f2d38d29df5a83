"""The public conformance suite: what a flow or a target must satisfy, and how often the verdict is wrong."""

from .calibration import Calibration, calibrate_verdict
from .flow import check_flow
from .synthetic import synthetic
from .target import check_target

__all__ = ["Calibration", "calibrate_verdict", "check_flow", "check_target", "synthetic"]
