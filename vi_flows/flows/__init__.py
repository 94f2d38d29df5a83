"""Normalizing flows: bijections with log-determinants in both directions, and the distributions they make."""
