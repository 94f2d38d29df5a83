"""The VAE: p(x, z) = p(z) p(x|z), and q(z|x), a flow whose parameters are read from x by a network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..arguments import one_of, whole
from ..flows import recipes
from ..flows.bases import StandardNormal
from ..flows.distribution import Flow
from .likelihoods import LIKELIHOODS, Likelihood
from .networks import NETWORKS

# the posteriors by name: a recipe, and how it is asked for here
POSTERIORS: dict[str, tuple[str, dict[str, Any]]] = {
    "diagonal": ("diagonal", {}),
    "full": ("gaussian", {}),
    "planar": ("planar", {"layers": 4}),
    "radial": ("radial", {"layers": 4}),
    "sylvester": ("sylvester", {"layers": 4}),
    "sylvester_householder": ("sylvester", {"layers": 4, "kind": "householder"}),
    "sylvester_triangular": ("sylvester", {"layers": 4, "kind": "triangular"}),
    "iaf": ("iaf", {"layers": 4, "hidden": (320,)}),
    "spline": ("spline", {"layers": 4, "hidden": (128,), "mixing": "none"}),
    "spline_autoregressive": ("spline_autoregressive", {"layers": 2, "hidden": (128,)}),
}
PRIOR_KINDS = ("normal", "flow")


@dataclass(frozen=True, eq=False)
class Terms:
    """Draws z (K, N, latent) of q(z|x) for N rows x, with log p(x|z), log p(z) and log q(z|x), each (K, N)."""

    z: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor

    @property
    def log_w(self) -> Tensor:
        """log p(x, z) − log q(z|x)."""
        return self.annealed(1.0)

    def annealed(self, beta: float) -> Tensor:
        """log p(x|z) + β (log p(z) − log q(z|x)): the weights of the β-VAE, and of KL warm-up."""
        return self.log_likelihood + beta * (self.log_prior - self.log_q)


class VAE(nn.Module):
    """A decoder p(x|z) with a prior p(z), and an encoder that gives the parameters of the flow q(z|x).

    Parameters
    ----------
    encoder: x (\\*batch, dim) -> context h (\\*batch, context).
    posterior: a flow of the latent size, built for that context.
    decoder: z (\\*batch, latent) -> raw outputs (\\*batch, channels, dim) of the likelihood.
    likelihood: p(x | raw).
    prior: a flow of the latent size without context; None for N(0, I).

    As a Pyro model and guide: ``SVI(vae.model, vae.guide, ...)``, both called with rows x.
    """

    def __init__(
        self, encoder: nn.Module, posterior: Flow, decoder: nn.Module, likelihood: Likelihood, prior: Flow | None = None
    ):
        super().__init__()
        prior = Flow([], StandardNormal(posterior.dim)) if prior is None else prior
        if posterior.context is None:
            raise ValueError("posterior: expected a flow with a context, got one without; pass context= to its recipe")
        if prior.context is not None or prior.dim != posterior.dim:
            given = f"dim {prior.dim}, context {prior.context}"
            raise ValueError(f"prior: expected a flow of dim {posterior.dim} without context, got {given}")
        self.encoder, self.posterior, self.decoder = encoder, posterior, decoder
        self.likelihood, self.prior = likelihood, prior
        self.mixed = False  # networks in bfloat16 while training; bounds are always evaluated in full

    @property
    def latent(self) -> int:
        return self.posterior.dim

    def forward(self, x: Tensor, draws: int | Tensor = 1, path: bool = False) -> Terms:
        """K draws of q(z|x) for each row of x (N, dim), with their terms.

        draws: K, or base noise (K, N, k) to make them from. path: log q has its gradient in z alone, its parameters
        held (sticking the landing, Roeder, Wu & Duvenaud 2017).
        """
        with self._networks(x):
            h = self.encoder(x)
        return self.terms(x, self.posterior(h.to(self.posterior.dtype)), draws, path)

    def terms(self, x: Tensor, q: Any, draws: int | Tensor, path: bool = False) -> Terms:
        """As :meth:`forward`, from q(z|x) itself: an encoder is run once for any number of draws."""
        noise = q.base.noise((draws, *q.batch_shape)) if isinstance(draws, int) else draws
        z, log_q = q.from_noise(noise, path)
        with self._networks(x):
            raw = self.decoder(z)
        return Terms(z, self.likelihood.log_prob(raw.to(z.dtype), x), self.prior().log_prob(z), log_q)

    def _networks(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed and self.training)

    def model(self, x: Tensor) -> Tensor:
        """The Pyro model of rows x (N, dim): sites z and x."""
        pyro.module("vae", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", self.prior().expand(Size([len(x)])))
            return pyro.sample("x", Pixels(self.likelihood, self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """The Pyro guide of :meth:`model`: z ~ q(z|x)."""
        pyro.module("vae", self)
        with pyro.plate("rows", len(x)):
            return pyro.sample("z", self.posterior(self.encoder(x)))

    @torch.no_grad()
    def sample(self, n: int, mean: bool = True) -> Tensor:
        """n draws of the model (n, dim): the likelihood's means at z ~ p(z), or draws of it."""
        z = self.prior().rsample_and_log_prob((whole("n", n),))[0]
        raw = self.decoder(z)
        return self.likelihood.mean(raw) if mean else self.likelihood.sample(raw)


class Pixels(TorchDistribution):
    """A likelihood at a decoder's outputs raw (\\*batch, channels, dim), as a law of x (\\*batch, dim) for Pyro."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, likelihood: Likelihood, raw: Tensor):
        self.likelihood, self.raw = likelihood, raw
        super().__init__(raw.shape[:-2], raw.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.raw, value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.likelihood.sample(self.raw.expand(Size(sample_shape) + self.raw.shape))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> Pixels:
        return Pixels(self.likelihood, self.raw.expand(Size(batch_shape) + self.raw.shape[-2:]))


@dataclass(frozen=True)
class Architecture:
    """What a VAE is built from, as JSON can hold it.

    Parameters
    ----------
    shape: (channels, height, width) of an image. latent: the size of z. centre, spread: mean and sd of training values,
        by which the encoder's input is standardised.
    network: "mlp", "conv" or "residual". likelihood: "bernoulli", "categorical", "logistic" or "gaussian".
    posterior: a name of ``POSTERIORS``; ``posterior_options`` go to its recipe. prior: "normal", or "flow": affine
        couplings, trained with the rest (f-VAE: Su & Wu 2018). network_options go to the network.
    """

    shape: tuple[int, int, int]
    latent: int = 64
    network: str = "mlp"
    likelihood: str = "bernoulli"
    posterior: str = "diagonal"
    prior: str = "normal"
    centre: float = 0.0
    spread: float = 1.0
    network_options: dict[str, Any] = field(default_factory=dict)
    posterior_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        whole("latent", self.latent)
        for name, known in (
            ("network", NETWORKS),
            ("likelihood", LIKELIHOODS),
            ("posterior", POSTERIORS),
            ("prior", PRIOR_KINDS),
        ):
            one_of(name, getattr(self, name), known)
        known = inspect.signature(getattr(recipes, POSTERIORS[self.posterior][0])).parameters
        for name, value in self.posterior_options.items():
            if name not in known:
                raise ValueError(f"{name}: expected none for posterior {self.posterior!r}, got {value!r}; leave it out")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(architecture: Architecture) -> VAE:
    """A fresh VAE; its parameters depend on the global generator alone."""
    scale = (architecture.centre, architecture.spread) if architecture.likelihood == "gaussian" else ()
    likelihood = LIKELIHOODS[architecture.likelihood](*scale)
    encoder, decoder = NETWORKS[architecture.network](
        architecture.shape,
        architecture.latent,
        likelihood.channels,
        architecture.centre,
        architecture.spread,
        **architecture.network_options,
    )
    recipe, options = POSTERIORS[architecture.posterior]
    make, options = getattr(recipes, recipe), options | architecture.posterior_options
    posterior = make(architecture.latent, encoder.context, **options)
    prior = recipes.realnvp(architecture.latent, hidden=(128,)) if architecture.prior == "flow" else None
    return VAE(encoder, posterior, decoder, likelihood, prior)
