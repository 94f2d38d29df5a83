"""A flow and a target in, draws of a defensive proposal with their weights, checks and a verdict out."""
