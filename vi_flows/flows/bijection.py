"""Bijections: one contract, a value and its log-determinant, in both directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from ..arguments import whole


class Bijection(ABC):
    """An invertible map from base z to sample x, built for one context: a throw-away object that owns no parameters.

    exact: whether its log-determinants are those of the map, or estimates by random probes. These are drawn when the
    layer is called, so that the bijection is a pure function of its argument; in its ``eval()`` mode such a layer gives
    an exact bijection if it can, for only these are judged.
    """

    exact: bool = True

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

    def initialise(self, x: Tensor, context: Tensor | None = None, inverted: bool = False) -> None:
        """Look once at data, rows x (N, dim) on the sample side, or on the base side of a layer that is ``inverted``.

        By default nothing; a layer whose start hangs on the data (scales of their own, say) sets its parameters here.
        """


def initialise(layers: Iterable[Layer], x: Tensor, context: Tensor | None = None, inverted: bool = False) -> None:
    """Let every layer of a stack look at data x (N, dim) in its own coordinates.

    The data go down the stack from the sample side, or up from the base side if it is inverted, through layers that
    have already seen them.
    """
    layers = list(layers)
    for layer in layers if inverted else reversed(layers):
        layer.initialise(x, context, inverted)
        bijection = layer(context)
        x, _ = bijection.forward_and_logdet(x) if inverted else bijection.inverse_and_logdet(x)


class Compose(Bijection):
    """f = f_K ∘ ... ∘ f_1: the first bijection is applied first; log-determinants add."""

    def __init__(self, bijections: Sequence[Bijection]):
        self.bijections = tuple(bijections)
        self.exact = all(bijection.exact for bijection in self.bijections)

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
        self.bijection, self.exact = bijection, bijection.exact

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

    def initialise(self, x: Tensor, context: Tensor | None = None, inverted: bool = False) -> None:
        self.layer.initialise(x, context, not inverted)


class Leading(Bijection):
    """A bijection of the first ``count`` coordinates; the others stay."""

    def __init__(self, inner: Bijection, count: int):
        self.inner, self.count, self.exact = inner, count, inner.exact

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = self.inner.forward_and_logdet(z[..., : self.count])
        return torch.cat([x, z[..., self.count :]], -1), logdet

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self.inner.inverse_and_logdet(x[..., : self.count])
        return torch.cat([z, x[..., self.count :]], -1), logdet

    def forward_and_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, logdet, own = self.inner.forward_and_score(z[..., : self.count], score[..., : self.count])
        return (
            torch.cat([x, z[..., self.count :]], -1),
            logdet,
            torch.cat([own, score[..., self.count :]], -1),
        )


class LeadingLayers(Layer):
    """Layers that act on the first ``count`` coordinates; see :class:`Leading`."""

    def __init__(self, layers: Sequence[Layer], count: int):
        super().__init__()
        self.layers, self.count = nn.ModuleList(layers), whole("count", count)

    def forward(self, context: Tensor | None = None) -> Bijection:
        return Leading(Compose([layer(context) for layer in self.layers]), self.count)

    def initialise(self, x: Tensor, context: Tensor | None = None, inverted: bool = False) -> None:
        initialise(self.layers, x[..., : self.count], context, inverted)


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
