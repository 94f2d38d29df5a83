"""Bijections of all coordinates together, and the layers that make them."""
