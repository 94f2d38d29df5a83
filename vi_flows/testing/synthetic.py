"""Random targets of which everything is known: exact flows over bases, log Z = 0 and exact draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..arguments import one_of, whole
from ..flows import recipes
from ..flows.bases import Base, Mixture, StandardNormal, StudentT
from ..flows.bijection import Bijection, Layer
from ..flows.distribution import Flow
from ..flows.layers.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..inference.estimate.evaluate import in_blocks
from ..running import seeded
from ..targets.known import KnownDensity

LARGEST_DIM = 20
# scored in one pass, in closed form; beside each, how far its parameters may be from the identity's: a spline, whose
# many parameters act together, makes spikes from about 0.3 on, which no quadrature resolves
FAMILIES = {"spline": 0.2, "realnvp": 0.6, "maf": 0.6, "radial": 0.6}
LEAST_SEVERITY = 1 / 12  # of these
DECADES = (0.0, 1.0, 3.0)  # scales of coordinates are 10^±decades
LARGEST_LOG_SCALE = 300.0  # of a funnel's coordinates: far outside all mass, where they stay as they are
# sets the draws of a target's (or hierarchy's) parameters apart from those of a fit of the same seed
STREAM = 1_000_003


class FunnelBijection(Bijection):
    """x₁ = s z₁ and x_i = e^{s z₁/2} z_i: over normal noise, the funnel of Neal 2003 with sd s; scale: (1,)."""

    def __init__(self, scale: Tensor):
        self.scale = scale

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        neck = self.scale * z[..., :1]
        log_scale = self._log_scale(neck)
        return torch.cat([neck, z[..., 1:] * log_scale.exp()], -1), self._logdet(log_scale, z.shape[-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale(x[..., :1])
        z = torch.cat([x[..., :1] / self.scale, x[..., 1:] * (-log_scale).exp()], -1)
        return z, -self._logdet(log_scale, x.shape[-1])

    @staticmethod
    def _log_scale(neck: Tensor) -> Tensor:
        return (neck / 2).clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)

    def _logdet(self, log_scale: Tensor, dim: int) -> Tensor:
        return self.scale.log()[0] + (dim - 1) * log_scale[..., 0]


class Banana(Bijection):
    """x₁ = z₁, x₂ = z₂ + b (z₁² − 1): over normal noise, the bent Gaussian of Haario et al. 1999; bend: (1,)."""

    def __init__(self, bend: Tensor):
        self.bend = bend

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._moved(z, self.bend), z.new_zeros(z.shape[:-1])

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._moved(x, -self.bend), x.new_zeros(x.shape[:-1])

    @staticmethod
    def _moved(z: Tensor, bend: Tensor) -> Tensor:
        return torch.cat([z[..., :1], z[..., 1:2] + bend * (z[..., :1].square() - 1), z[..., 2:]], -1)


class SyntheticTarget(KnownDensity):
    """The law of a frozen flow in float64 as a target: log Z = 0, ``draws`` exact, ``how`` says what it is."""

    def __init__(self, flow: Flow, kind: str, seed: int, how: str) -> None:
        self.flow, self.kind, self.seed = flow.double().requires_grad_(False), kind, seed
        self.law = self.flow()  # its parameters do not change: one bijection serves all calls
        super().__init__(self._log_p, flow.dim, log_z=0.0, how=how, draw=self._draw)

    def target(self) -> SyntheticTarget:
        """What is fitted: this density itself."""
        return self

    def log_z_of(self, log_evidence: float) -> float:
        """The log normaliser that a fit's log evidence stands for."""
        return log_evidence

    @staticmethod
    def points(draws: Tensor) -> Tensor:
        """Draws of a fit as x (N, dim)."""
        return draws

    def _log_p(self, x: Tensor) -> Tensor:
        z, logdet = self.law.bijection.inverse_and_logdet(x)
        return self.law.base.log_prob(z) + logdet

    def _draw(self, n: int, generator: Generator) -> Tensor:
        """Bases draw from torch's global generator, which is left as it was."""
        with seeded(int(torch.randint(2**62, (), generator=generator))):
            return in_blocks(lambda rows: self.law.from_noise(rows)[0], self.law.base.noise((n,)))


def synthetic(kind: str, seed: int, dim: int | None = None) -> SyntheticTarget:
    """A random target: a base of that kind, mostly bent by a random flow, then scaled and sheared, badly or mildly.

    kind: "normal", "student", "mixture", "funnel" or "banana". dim: drawn from 1 (funnel and banana: 2) to 20 unless
    given. The target depends on (kind, seed, dim) alone. Raises ValueError for an unknown kind or a dim too small.
    """
    one_of("kind", kind, TARGET_KINDS)
    make, least = TARGET_KINDS[kind]
    if dim is not None:
        whole("dim", dim, least, f"less is too few for kind {kind!r}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # which random numbers are drawn depends on it
    try:
        with seeded(STREAM * (seed + 1) + list(TARGET_KINDS).index(kind)):
            drawn = round(math.exp(_uniform(math.log(least), math.log(LARGEST_DIM))))
            dim = drawn if dim is None else dim
            base, layers, words = make(dim)
            bent, bend_words = _bent(dim)
            affine, affine_words = _affine(dim)
            flow = Flow([*layers, *bent, affine], base)
    finally:
        torch.set_default_dtype(before)
    return SyntheticTarget(flow, kind, seed, f"{words}, {bend_words}, {affine_words}")


def _normal(dim: int) -> tuple[Base, list[Layer], str]:
    return StandardNormal(dim), [], "normal"


def _student(dim: int) -> tuple[Base, list[Layer], str]:
    df = 3 * 10 ** _uniform(0, 1)
    return StudentT(dim, df), [], f"t of {df:.1f} degrees of freedom"


def _mixture(dim: int) -> tuple[Base, list[Layer], str]:
    """2 to 5 components, 1 to 20 of their sds apart, of equal weights or of weights that differ e-fold."""
    count, apart = 2 + _choice(4), 10 ** _uniform(0, 1.3)
    loc = apart * torch.randn(count, dim, dtype=torch.float64) / math.sqrt(2 * dim)
    scale = 0.5 + torch.rand(count, dim, dtype=torch.float64)
    weights = (_choice(2) * torch.randn(count, dtype=torch.float64)).softmax(0)
    words = f"mixture of {count}, {apart:.1f} apart, least weight {float(weights.min()):.2f}"
    return Mixture(loc, scale, weights), [], words


def _funnel(dim: int) -> tuple[Base, list[Layer], str]:
    scale = _uniform(0.3, 3.0)
    layer = Fixed(FunnelBijection, scale=torch.tensor([scale], dtype=torch.float64))
    return StandardNormal(dim), [layer], f"funnel of sd {scale:.1f}"


def _banana(dim: int) -> tuple[Base, list[Layer], str]:
    bend = 3 * 10 ** _uniform(-1.5, 0)
    layer = Fixed(Banana, bend=torch.tensor([bend], dtype=torch.float64))
    return StandardNormal(dim), [layer], f"banana of bend {bend:.1f}"


TARGET_KINDS: dict[str, tuple[Callable[[int], tuple[Base, list[Layer], str]], int]] = {
    "normal": (_normal, 1),
    "student": (_student, 1),
    "mixture": (_mixture, 1),
    "funnel": (_funnel, 2),
    "banana": (_banana, 2),
}


def _bent(dim: int) -> tuple[list[Layer], str]:
    """The layers of a random recipe with random parameters; of one in five targets none."""
    which = _choice(len(FAMILIES) + 1)
    if which == len(FAMILIES):
        return [], "not bent"
    name, largest = list(FAMILIES.items())[which]
    options = {"hidden": (16, 16)} if name != "radial" else {}
    flow = getattr(recipes, name)(dim, layers=2, **options)
    severity = largest * math.exp(_uniform(math.log(LEAST_SEVERITY), 0))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(severity * torch.randn_like(parameter))
    return list(flow.layers), f"{name} of severity {severity:.2f}"


def _affine(dim: int) -> tuple[Layer, str]:
    """x = S (I + strictly lower) z + shift, log₁₀ of the scales S uniform within ±decades."""
    decades, shear = DECADES[_choice(len(DECADES))], _uniform(0, 1)
    scale = 10 ** (decades * (2 * torch.rand(dim, dtype=torch.float64) - 1))
    lower = torch.randn(dim, dim, dtype=torch.float64).tril(-1) * shear / math.sqrt(dim)
    tril = scale[:, None] * (torch.eye(dim, dtype=torch.float64) + lower)
    shift = scale * torch.randn(dim, dtype=torch.float64)
    words = f"scales {float(scale.min()):.2g} to {float(scale.max()):.2g}"
    return Fixed(LowerTriangular, shift=shift, scale_tril=tril), words


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _choice(count: int) -> int:
    return int(torch.randint(count, ()))
