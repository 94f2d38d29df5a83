"""Scales outside, Gaussian inside: a target in, a flow out of few coordinates and of the others given these."""
