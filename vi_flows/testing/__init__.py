"""The public conformance suite: what a flow or a target must satisfy; how often verdicts and posteriors are wrong."""

from .calibration import Calibration, calibrate_verdict
from .flow import check_flow
from .sbc import SimulationBasedCalibration, simulation_based_calibration
from .synthetic import synthetic
from .target import check_target

__all__ = [
    "Calibration",
    "SimulationBasedCalibration",
    "calibrate_verdict",
    "check_flow",
    "check_target",
    "simulation_based_calibration",
    "synthetic",
]
