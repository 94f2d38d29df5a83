"""Bijections: one contract, a value and its log-determinant, in both directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform


class Bijection(ABC):
    """An invertible map from base z to sample x, built for one context: a throw-away object that owns no parameters."""

    @abstractmethod
    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (\\*batch, dim) -> x = f(z) (\\*batch, dim) and log|det dx/dz| (\\*batch)."""

    @abstractmethod
    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (\\*batch, dim) -> z = f⁻¹(x) (\\*batch, dim) and log|det dz/dx| (\\*batch)."""

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x = f(z), log|det dx/dz| and the score of x's law, J⁻ᵀ (score − ∇_z log|det J|) with J = dx/dz.

        A score is the gradient of a log-density in its argument, parameters held; that of a flow follows the samples
        through its layers, and no layer need be inverted (Vaitl et al. 2024). This default asks the inverse all the
        same: what knows how to solve with Jᵀ overrides it.

        Parameters
        ----------
        z: (\\*batch, dim), in a graph.
        score: ∂ log q₀(z)/∂z (\\*batch, dim), in none.

        Returns
        -------
        x (\\*batch, dim) and log|det| (\\*batch), in the graph of z and of parameters; the score at x (\\*batch, dim),
        in none, NaN where an inverse has not converged.
        """
        x, logdet = self.forward_and_logdet(z)
        held = x.detach().requires_grad_()
        back, back_logdet = self.inverse_and_logdet(held)
        (score,) = pulled_back((back, back_logdet), (score, torch.ones_like(back_logdet)), held)
        return x, logdet, score.masked_fill(back_logdet.isnan().unsqueeze(-1), torch.nan)


def pulled_back(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Σ cotangentᵀ ∂output/∂input for each input: a gradient in these alone, which leaves the graph as it is."""
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(given) for given in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True)


class Layer(nn.Module, ABC):
    """A module whose call gives a :class:`Bijection`: it owns the parameters, or the network that makes them."""

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> Bijection:
        """context (\\*batch, context_dim) or None -> the bijection for that context."""


class Compose(Bijection):
    """f = f_K ∘ ... ∘ f_1: the first bijection is applied first; log-determinants add."""

    def __init__(self, bijections: Sequence[Bijection]):
        self.bijections = tuple(bijections)

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logdets = []
        for bijection in self.bijections:
            z, logdet = bijection.forward_and_logdet(z)
            logdets.append(logdet)
        return z, _total(logdets, z)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdets = []
        for bijection in reversed(self.bijections):
            x, logdet = bijection.inverse_and_logdet(x)
            logdets.append(logdet)
        return x, _total(logdets, x)

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logdets = []
        for bijection in self.bijections:
            z, logdet, score = bijection.forward_and_score(z, score)
            logdets.append(logdet)
        return z, _total(logdets, z), score


def _total(logdets: Sequence[Tensor], z: Tensor) -> Tensor:
    """The sum of log-determinants, 0 if there are none, with the batch shape of z."""
    if not logdets:
        return z.new_zeros(z.shape[:-1])
    total = logdets[0]
    for logdet in logdets[1:]:
        total = total + logdet
    return total.expand(z.shape[:-1])


class Inverse(Bijection):
    """f⁻¹ of a bijection f: the two directions exchanged."""

    def __init__(self, bijection: Bijection):
        self.bijection = bijection

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_logdet(z)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.forward_and_logdet(x)


class Inverted(Layer):
    """The layer whose bijection is the :class:`Inverse` of another layer's (MAF is an inverted IAF layer)."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, context: Tensor | None = None) -> Bijection:
        return Inverse(self.layer(context))


class BijectionTransform(Transform):
    """A bijection as a ``torch.distributions`` transform from base z to sample x, for ``TransformedDistribution``."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, bijection: Bijection):
        super().__init__(cache_size=0)
        self.bijection = bijection

    def _call(self, x: Tensor) -> Tensor:
        return self.bijection.forward_and_logdet(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.bijection.inverse_and_logdet(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bijection.forward_and_logdet(x)[1]

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        return self  # nothing is cached: a cached log-determinant goes stale when parameters move
