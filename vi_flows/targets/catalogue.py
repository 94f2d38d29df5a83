"""Densities of the literature with known answers: ``vf.fit(vf.catalogue.funnel())``, or ``get("funnel")`` by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from ..arguments import one_of, whole
from .known import Box, KnownDensity, cells, grid_draws, normal, uniform

LOG_2PI = math.log(2 * math.pi)
LARGEST_EXPONENT = 600.0  # of a precision e^{-v}: beyond it, and far outside all mass, it stays as it is
SQUARED_FLOOR = 1e-16  # added to a squared norm, whose root has no derivatives at 0
WAVE_WINDOW: Box = ((-13.0, 13.0), (-7.5, 4.5))  # where U2, U3 and U4 have all their mass
BROWNIAN_STEPS = 30
BROWNIAN_TIMES = (*range(1, 11), *range(21, 31))
BROWNIAN_OBSERVED = (
    *(0.21592641, 0.118771404, -0.07945447, 0.037677474, -0.27885845),
    *(-0.1484156, -0.3250906, -0.22957903, -0.44110894, -0.09830782),
    *(-0.8786016, -0.83736074, -0.7384849, -0.8939254, -0.7774566),
    *(-0.70238715, -0.87771565, -0.51853573, -0.6948214, -0.6202789),
)


def u1() -> KnownDensity:
    """A ring of radius 2 cut into two halves, U1 of Rezende & Mohamed 2015 (D = 2)."""

    def log_p(z: Tensor) -> Tensor:
        halves = torch.stack([_kernel(z[:, 0] - 2, 0.6), _kernel(z[:, 0] + 2, 0.6)])
        return _kernel(_norm(z) - 2, 0.4) + halves.logsumexp(0)

    box = ((-4.5, 4.5), (-4.5, 4.5))
    return _in_plane(log_p, 1.877502, box, modes=2, mode_of=lambda z: (z[:, 0] > 0).long())


def u2() -> KnownDensity:
    """A sine wave, U2 of Rezende & Mohamed 2015, made proper by −(z₁/4)⁴/2 (D = 2)."""
    return _in_plane(lambda z: _kernel(z[:, 1] - _wave(z), 0.4) + _quartic(z), 2.157104)


def u3() -> KnownDensity:
    """A sine wave that parts and joins again, U3 of Rezende & Mohamed 2015, made proper by −(z₁/4)⁴/2 (D = 2)."""
    return _two_waves(lambda z: 3 * _kernel(z[:, 0] - 1, 0.6).exp(), 0.35, 2.716720)


def u4() -> KnownDensity:
    """A sine wave that forks, U4 of Rezende & Mohamed 2015, made proper by −(z₁/4)⁴/2 (D = 2)."""
    return _two_waves(lambda z: 3 * torch.sigmoid((z[:, 0] - 1) / 0.3), 0.4, 2.785713)


def rings() -> KnownDensity:
    """Two thin concentric rings of radius 1 and 2, after Stimper, Schölkopf & Hernández-Lobato 2022 (D = 2)."""

    def log_p(z: Tensor) -> Tensor:
        r = _norm(z)
        return torch.stack([_kernel(r - 1, 0.125), _kernel(r - 2, 0.125)]).logsumexp(0)

    box = ((-3.2, 3.2), (-3.2, 3.2))
    return _in_plane(log_p, 1.775986, box, modes=2, mode_of=lambda z: (_norm(z) > 1.5).long())


def funnel(dim: int = 10) -> KnownDensity:
    """The funnel of Neal 2003: v ~ N(0, 3²), the others ~ N(0, eᵛ) given v (D = 10 or any)."""
    whole("dim", dim, 2)

    def log_p(x: Tensor) -> Tensor:
        v, others = x[:, 0], x[:, 1:]
        squares = _precision(v) * (others * others).sum(-1)
        return _kernel(v, 3.0) - math.log(3) - 0.5 * (squares + (dim - 1) * v + dim * LOG_2PI)

    def draw(n: int, generator: Generator) -> Tensor:
        x = normal(n, dim, generator)
        v = 3 * x[:, :1]
        return torch.cat([v, (v / 2).exp() * x[:, 1:]], 1)

    return KnownDensity(log_p, dim, log_z=0.0, how="normalised", draw=draw)


def banana(dim: int = 10) -> KnownDensity:
    """A bent Gaussian, after Haario et al. 1999: x₁ ~ N(0, 3²), x₂ + (9 − x₁²)/3 and the others ~ N(0, 1) (D = 10)."""
    whole("dim", dim, 2)

    def log_p(x: Tensor) -> Tensor:
        straight = torch.cat([x[:, :1] / 3, x[:, 1:2] - _bend(x), x[:, 2:]], 1)
        return -0.5 * (straight * straight).sum(-1) - math.log(3) - 0.5 * dim * LOG_2PI

    def draw(n: int, generator: Generator) -> Tensor:
        y = normal(n, dim, generator)
        x = torch.cat([3 * y[:, :1], y[:, 1:]], 1)
        return torch.cat([x[:, :1], x[:, 1:2] + _bend(x), x[:, 2:]], 1)

    return KnownDensity(log_p, dim, log_z=0.0, how="normalised", draw=draw)


def gmm40() -> KnownDensity:
    """Forty Gaussians of equal weight spread over (−40, 40)², of Midgley et al. 2023 (D = 2)."""
    count, scale = 40, math.log1p(math.e)  # softplus(1)
    uniform = torch.rand(count, 2, dtype=torch.float32, generator=Generator().manual_seed(0))
    centres = ((uniform - 0.5) * 80).double()

    def squares(x: Tensor) -> Tensor:
        return ((x.unsqueeze(1) - centres.to(x)) / scale).square().sum(-1)

    def log_p(x: Tensor) -> Tensor:
        return (-0.5 * squares(x)).logsumexp(-1) - math.log(count) - 2 * math.log(scale) - LOG_2PI

    def draw(n: int, generator: Generator) -> Tensor:
        which = torch.randint(count, (n,), generator=generator)
        return centres[which] + scale * normal(n, 2, generator)

    return KnownDensity(
        log_p, 2, log_z=0.0, how="normalised", draw=draw, modes=count, mode_of=lambda x: squares(x).argmin(-1)
    )


def manywell(dim: int = 8) -> KnownDensity:
    """Pairs of a double well −d⁴ + 6d² + d/2 and a normal, of Noé et al. 2019: 2^(D/2) modes (D = 8 or any even)."""
    whole("dim", dim, 2)
    if dim % 2:
        raise ValueError(f"dim: expected an even number, got {dim}; each well is a pair of coordinates")
    well, step = torch.linspace(-4, 4, 8001, dtype=torch.float64), 0.001
    log_well = _well(well)
    log_z = float(dim / 2 * (log_well.logsumexp(0) + math.log(step) + 0.5 * LOG_2PI))
    bits = 2 ** torch.arange(dim // 2)

    def log_p(x: Tensor) -> Tensor:
        return (_well(x[:, 0::2]) - 0.5 * x[:, 1::2].square()).sum(-1)

    def draw(n: int, generator: Generator) -> Tensor:
        cell = cells(log_well, n * dim // 2, generator)
        d = well[cell] + step * (uniform(len(cell), generator) - 0.5)
        return torch.stack([d, normal(len(cell), 1, generator)[:, 0]], -1).reshape(n, dim)

    return KnownDensity(
        log_p,
        dim,
        log_z=log_z,
        how="quadrature of one well",
        draw=draw,
        modes=2 ** (dim // 2),
        mode_of=lambda x: (x[:, 0::2] > 0).long() @ bits,
    )


def logistic_regression(
    x: Tensor, y: Tensor, prior_sd: float, log_z: float | None = None, log_z_se: float = 0.0
) -> KnownDensity:
    """The posterior of the coefficients of a logistic regression, y ~ Bernoulli(σ(xβ)), β ~ N(0, prior_sd²).

    x: (N, D), with a column of ones for an intercept. y: (N,), 0 or 1. log_z, log_z_se: the log evidence, if known.
    Raises ValueError for other shapes and values.
    """
    x, y = (torch.as_tensor(value, dtype=torch.float64) for value in (x, y))
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: expected shapes (N, D) and (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("y: expected 0 or 1 only; recode the two classes")
    if not prior_sd > 0:
        raise ValueError(f"prior_sd: expected a positive number, got {prior_sd!r}")
    signed, dim = (2 * y - 1).unsqueeze(-1) * x, x.shape[1]
    constant = -dim * (math.log(prior_sd) + 0.5 * LOG_2PI)

    def log_p(beta: Tensor) -> Tensor:
        return logsigmoid(beta @ signed.to(beta).mT).sum(-1) + _kernel(beta, prior_sd).sum(-1) + constant

    how = "" if log_z is None else "annealed importance sampling"
    return KnownDensity(log_p, dim, log_z=log_z, log_z_se=log_z_se, how=how)


def credit(data: str | Path) -> KnownDensity:
    """German credit (Statlog): logistic regression on columns divided by their sd, β ~ N(0, 10²) (D = 25).

    data: a folder with ``german.data-numeric`` of the UCI repository: 24 numbers and the class, 1 or 2, in a line.
    Raises ValueError without it.
    """
    table = np.loadtxt(_file(data, "german.data-numeric"))
    x, y = table[:, :-1], table[:, -1] == 2
    design = np.column_stack([np.ones(len(x)), x / x.std(0)])
    return logistic_regression(torch.from_numpy(design), torch.from_numpy(y), 10.0, -585.098, 0.001)


def ionosphere(data: str | Path) -> KnownDensity:
    """Radar returns (Sigillito et al. 1989): logistic regression on standardised columns, β ~ N(0, 1) (D = 35).

    data: a folder with ``ionosphere.npz``, the arrays X (351, 34) and y (351,), 0 or 1, of the UCI repository's data
    set. Raises ValueError without it.
    """
    with np.load(_file(data, "ionosphere.npz")) as file:
        x, y = file["X"].astype(float), file["y"]
    sd = x.std(0)
    design = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / np.where(sd > 0, sd, 1.0)])
    return logistic_regression(torch.from_numpy(design), torch.from_numpy(y), 1.0, -111.609, 0.002)


def brownian() -> KnownDensity:
    """Brownian motion of unknown scales, unseen in the middle, of the Inference Gym (Sountsov et al. 2020) (D = 32).

    log s, log σ ~ N(0, 2²); x₁ ~ N(0, s²), xₜ ~ N(xₜ₋₁, s²) for t ≤ 30; yₜ ~ N(xₜ, σ²) at t = 1..10 and 21..30.
    Coordinates: log s, log σ, x₁..x₃₀. All is Gaussian given the scales, so that log Z is a quadrature over these two.
    """
    walk, how = _Walk(BROWNIAN_STEPS, BROWNIAN_TIMES, BROWNIAN_OBSERVED), "quadrature over the scales"
    return KnownDensity(walk.log_p, BROWNIAN_STEPS + 2, log_z=1.187749, how=how, draw=walk.draw)


class _Walk:
    """A Gaussian random walk x, seen with noise as y at some times; its log scales (log s, log σ) ~ N(0, 2²)."""

    def __init__(self, steps: int, times: Sequence[int], y: Sequence[float]) -> None:
        self.steps, self.seen, self.y = steps, torch.tensor(times) - 1, torch.tensor(y, dtype=torch.float64)
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        self.shared = torch.minimum(t.unsqueeze(1), t)[self.seen]  # cov(x at the times seen, x) / s²: min(t, t')
        self.values, self.vectors = torch.linalg.eigh(self.shared[:, self.seen])

    def log_p(self, x: Tensor) -> Tensor:
        scales, path = x[:, :2], x[:, 2:]
        moved = torch.cat([path[:, :1], path[:, 1:] - path[:, :-1]], 1)
        missed = path[:, self.seen] - self.y.to(x)
        squares = torch.stack([moved.square().sum(-1), missed.square().sum(-1)], -1)
        counts = x.new_tensor([self.steps, len(self.y)])
        given = -0.5 * (_precision(2 * scales) * squares + (2 * scales + LOG_2PI) * counts)
        return (given + _kernel(scales, 2.0) - math.log(2) - 0.5 * LOG_2PI).sum(-1)

    def _variances(self, scales: Tensor) -> Tensor:
        """Of the principal components of y given the scales (N, 2): (N, len(y))."""
        return (2 * scales[:, :1]).exp() * self.values + (2 * scales[:, 1:]).exp()

    def log_scales(self, scales: Tensor) -> Tensor:
        """log p(scales, y), the path integrated out, up to a constant."""
        variance = self._variances(scales)
        return _kernel(scales, 2.0).sum(-1) - 0.5 * ((self.y @ self.vectors).square() / variance + variance.log()).sum(
            -1
        )

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Scales by their grid; then a path from the prior, corrected by how its own data miss y (Matheron's rule)."""
        scales = grid_draws(self.log_scales, ((-14.0, 4.0), (-14.0, 4.0)), n, generator)
        s, sigma = scales.exp().unsqueeze(1).unbind(-1)
        path = s * normal(n, self.steps, generator).cumsum(1)
        missed = self.y - path[:, self.seen] - sigma * normal(n, len(self.y), generator)
        solved = (missed @ self.vectors / self._variances(scales)) @ self.vectors.mT
        return torch.cat([scales, path + s.square() * (solved @ self.shared)], 1)


DENSITIES: dict[str, Callable[..., KnownDensity]] = {
    **{f.__name__: f for f in (u1, u2, u3, u4, rings, funnel, banana, gmm40)},
    **{"manywell8": manywell, "credit": credit, "ionosphere": ionosphere, "brownian": brownian},
}


def names() -> tuple[str, ...]:
    """The names that :func:`get` knows."""
    return tuple(DENSITIES)


def summary(name: str) -> str:
    """One line on the density of that name, its source included."""
    return inspect.getdoc(DENSITIES[name]).splitlines()[0].rstrip(".")


def needs_data(name: str) -> bool:
    """Whether the density of that name is the posterior of data that are not part of the package."""
    return "data" in inspect.signature(DENSITIES[name]).parameters


def get(name: str, data: str | Path | None = None) -> KnownDensity:
    """The density of that name. data: the folder of its data file, for those that :func:`needs_data` names.

    Raises ValueError for an unknown name, for data missing and for data not needed.
    """
    one_of("name", name, DENSITIES)
    if needs_data(name) != (data is not None):
        got = "none; it is the posterior of data that are not part of vi_flows" if data is None else f"{data}; drop it"
        raise ValueError(f"data: expected {'a folder' if data is None else 'none'} for {name!r}, got {got}")
    return DENSITIES[name](data) if needs_data(name) else DENSITIES[name]()


def _kernel(x: Tensor, sd: float) -> Tensor:
    return -0.5 * (x / sd).square()


def _norm(z: Tensor) -> Tensor:
    return (z.square().sum(-1) + SQUARED_FLOOR).sqrt()


def _wave(z: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * z[:, 0])


def _quartic(z: Tensor) -> Tensor:
    return -0.5 * (z[:, 0] / 4) ** 4


def _bend(x: Tensor) -> Tensor:
    return (x[:, :1].square() - 9) / 3


def _well(d: Tensor) -> Tensor:
    return -(d**4) + 6 * d.square() + 0.5 * d


def _precision(v: Tensor) -> Tensor:
    """e^{−v}, finite wherever v is."""
    return (-v).clamp(max=LARGEST_EXPONENT).exp()


def _two_waves(gap: Callable[[Tensor], Tensor], sd: float, log_z: float) -> KnownDensity:
    """U3 and U4: two sine waves, of sds ``sd`` and 0.35, the second lower by ``gap``."""

    def waves(z: Tensor) -> Tensor:
        height = z[:, 1] - _wave(z)
        return torch.stack([_kernel(height, sd), _kernel(height + gap(z), 0.35)])

    return _in_plane(
        lambda z: waves(z).logsumexp(0) + _quartic(z), log_z, modes=2, mode_of=lambda z: waves(z).argmax(0)
    )


def _in_plane(log_p: Callable[[Tensor], Tensor], log_z: float, box: Box = WAVE_WINDOW, **modes: Any) -> KnownDensity:
    def draw(n: int, generator: Generator) -> Tensor:
        return grid_draws(log_p, box, n, generator)

    return KnownDensity(log_p, 2, log_z=log_z, how="quadrature on a grid", draw=draw, **modes)


def _file(data: str | Path, name: str) -> Path:
    path = Path(data) / name
    if not path.is_file():
        raise ValueError(f"data: expected a folder with {name}, got {data}; fetch that file from the UCI repository")
    return path
