"""Elementwise bijections, of raw numbers that a conditioner makes."""
