"""What is made of a posterior: a table, ArviZ's InferenceData, pictures. Imports matplotlib; vi_flows does not."""

from ..inference.estimate.psis import self_test
from .inference_data import to_arviz
from .plots import plot
from .table import summary

__all__ = ["plot", "self_test", "summary", "to_arviz"]
