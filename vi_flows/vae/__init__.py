"""Variational autoencoders whose posterior is a flow: data, networks, the model, training and evaluation."""

from .data import Images, load
from .model import POSTERIORS, VAE, Architecture, Terms, build

__all__ = ["POSTERIORS", "VAE", "Architecture", "Images", "Terms", "build", "load"]
