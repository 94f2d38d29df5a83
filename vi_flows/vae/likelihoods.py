"""Likelihoods of pixels: what a decoder's raw numbers say of an image, summed over its pixels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, softplus

PIXEL_LEVELS = 256  # of a byte; a pixel of level k has the value k / TOP
TOP = PIXEL_LEVELS - 1
LOWEST = -7.0  # of log-scales, relative to the range or the spread of the data
LINEAR_BELOW = -40.0  # eᵗ below which 1 − exp(−eᵗ) is eᵗ in every precision


class Likelihood(ABC):
    """p(x | raw), a product over pixels: raw (\\*batch, channels, dim), and x (\\*batch, dim), values of ``Images``."""

    channels: int  # raw numbers for each pixel
    levels: int | None  # values that a pixel can take; None for a density

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(x | raw), (\\*batch,); x may lack leading axes of raw, as where raw holds several draws for an image.

        Raises ValueError if raw has not ``channels`` numbers for every pixel of x.
        """
        if raw.shape[-2:] != (self.channels, x.shape[-1]):
            expected = (self.channels, x.shape[-1])
            raise ValueError(
                f"raw: expected {expected} numbers an image, got {tuple(raw.shape[-2:])}; check the decoder"
            )
        return self.pixels(_single(raw), x).sum(-1)

    @abstractmethod
    def pixels(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p of every pixel, (\\*batch, dim)."""

    @abstractmethod
    def mean(self, raw: Tensor) -> Tensor:
        """E[x | raw], (\\*batch, dim)."""

    @abstractmethod
    def sample(self, raw: Tensor) -> Tensor:
        """A draw of x, (\\*batch, dim), from the global generator."""

    @abstractmethod
    def check(self, x: Tensor, name: str) -> None:
        """ValueError in one line, naming ``name``, for values that x cannot take."""


class Bernoulli(Likelihood):
    """p(x = 1) = sigmoid(raw): pixels that are 0 or 1."""

    channels, levels = 1, 2

    def pixels(self, raw: Tensor, x: Tensor) -> Tensor:
        logits = raw.squeeze(-2)
        return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")

    def mean(self, raw: Tensor) -> Tensor:
        return _single(raw).squeeze(-2).sigmoid()

    def sample(self, raw: Tensor) -> Tensor:
        return torch.bernoulli(self.mean(raw))

    def check(self, x: Tensor, name: str) -> None:
        remedy = 'binarise grey levels (binarise="dynamic"), or take another likelihood'
        _refuse(name, x, (x == 0) | (x == 1), "pixels of 0 or 1 for the Bernoulli likelihood", remedy)


class Categorical(Likelihood):
    """p(x = k/255) = softmax(raw)_k: any distribution on the 256 levels (van den Oord et al. 2016)."""

    channels, levels = PIXEL_LEVELS, PIXEL_LEVELS

    def pixels(self, raw: Tensor, x: Tensor) -> Tensor:
        batch, dim = raw.shape[:-2], raw.shape[-1]
        level = _level(x).long().expand(*batch, dim)
        rows = math.prod(batch)
        loss = cross_entropy(raw.reshape(rows, PIXEL_LEVELS, dim), level.reshape(rows, dim), reduction="none")
        return -loss.view(*batch, dim)

    def mean(self, raw: Tensor) -> Tensor:
        levels = torch.arange(PIXEL_LEVELS, device=raw.device, dtype=_single(raw).dtype)
        return (_single(raw).softmax(-2) * levels.unsqueeze(-1)).sum(-2) / TOP

    def sample(self, raw: Tensor) -> Tensor:
        logits = _single(raw)
        return torch.distributions.Categorical(logits=logits.movedim(-2, -1)).sample().to(logits.dtype) / TOP

    def check(self, x: Tensor, name: str) -> None:
        _check_levels(x, name, "categorical")


class DiscretisedLogistic(Likelihood):
    """P(k) = σ((k + ½ − m)/s) − σ((k − ½ − m)/s), the first and the last level reaching to ∓∞ (Kingma et al. 2016).

    m and s are in levels: m = 127.5 (1 + raw_0), log s = log 127.5 + raw_1, bounded below (Salimans et al. 2017).
    """

    channels, levels = 2, PIXEL_LEVELS

    def pixels(self, raw: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self._parameters(raw)
        level, slope = _level(x), (-log_scale).exp()
        # with u above and v below the level, σ(u) − σ(v) = σ(u) σ(−v) (1 − e^(v − u)): no digits cancel in the tails
        below_upper = logsigmoid((level + 0.5 - mean) * slope)
        above_lower = logsigmoid((mean - level + 0.5) * slope)
        inner = below_upper + above_lower + _log_share(-log_scale)
        return torch.where(level <= 0, below_upper, torch.where(level >= TOP, above_lower, inner))

    def mean(self, raw: Tensor) -> Tensor:
        mean, log_scale = self._parameters(_single(raw))
        slope = (-log_scale).exp()
        # E k = Σ_k P(level ≥ k), one level at a time: 255 arrays of the size of x would be too many
        total = torch.zeros_like(mean)
        for level in range(1, PIXEL_LEVELS):
            total += ((mean - level + 0.5) * slope).sigmoid()
        return total / TOP

    def sample(self, raw: Tensor) -> Tensor:
        mean, log_scale = self._parameters(_single(raw))
        draw = mean + log_scale.exp() * torch.rand_like(mean).logit()
        return draw.round().clamp(0, TOP) / TOP

    def check(self, x: Tensor, name: str) -> None:
        _check_levels(x, name, "logistic")

    @staticmethod
    def _parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = raw.unbind(-2)
        return TOP / 2 * (1 + mean), math.log(TOP / 2) + _bounded_below(log_scale)


class Gaussian(Likelihood):
    """x ~ N(centre + spread raw_0, sd²), log sd = log spread + raw_1, bounded below: real-valued data.

    The bound keeps a pixel that never varies from sending the density to infinity. With centre and spread those of the
    data, raw numbers near 0 fit data of any units.
    """

    channels, levels = 2, None

    def __init__(self, centre: float = 0.0, spread: float = 1.0):
        if not (math.isfinite(centre) and math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread: expected a positive number, got {spread!r} about {centre!r}; check the data")
        self.centre, self.spread = centre, spread

    def pixels(self, raw: Tensor, x: Tensor) -> Tensor:
        mean, log_sd = self._parameters(raw)
        return -0.5 * ((x - mean) * (-log_sd).exp()).square() - log_sd - 0.5 * math.log(2 * math.pi)

    def mean(self, raw: Tensor) -> Tensor:
        return self._parameters(_single(raw))[0]

    def sample(self, raw: Tensor) -> Tensor:
        mean, log_sd = self._parameters(_single(raw))
        return mean + log_sd.exp() * torch.randn_like(mean)

    def check(self, x: Tensor, name: str) -> None:
        _refuse(name, x, x.isfinite(), "finite numbers for the Gaussian likelihood", "leave such rows out")

    def _parameters(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = raw.unbind(-2)
        return self.centre + self.spread * mean, math.log(self.spread) + _bounded_below(log_sd)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "logistic": DiscretisedLogistic,
    "gaussian": Gaussian,
}


def _single(raw: Tensor) -> Tensor:
    """raw in single precision at least: a sum of 784 terms in half precision is off by nats."""
    return raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw


def _level(x: Tensor) -> Tensor:
    return (TOP * x).round()


def _bounded_below(log_scale: Tensor) -> Tensor:
    """LOWEST + softplus(log_scale − LOWEST): log_scale itself where it is well above the bound."""
    return LOWEST + softplus(log_scale - LOWEST)


def _log_share(t: Tensor) -> Tensor:
    """log(1 − exp(−eᵗ)), which is t where eᵗ is tiny."""
    return torch.where(t < LINEAR_BELOW, t, (-torch.expm1(-t.clamp(min=LINEAR_BELOW).exp())).log())


def _check_levels(x: Tensor, name: str, kind: str) -> None:
    fits = (x >= 0) & (x <= 1) & ((TOP * x - _level(x)).abs() < 1e-3)
    expected = f"pixels of k/255, k from 0 to 255, for the {kind} likelihood"
    _refuse(name, x, fits, expected, 'give bytes, or take likelihood="gaussian"')


def _refuse(name: str, x: Tensor, fits: Tensor, expected: str, remedy: str) -> None:
    if not fits.all():
        raise ValueError(f"{name}: expected {expected}, got {x[~fits][0].item():.6g}; {remedy}")
