"""Fit q to p and judge it."""
