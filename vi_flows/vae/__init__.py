"""Variational autoencoders whose posterior is a flow."""
