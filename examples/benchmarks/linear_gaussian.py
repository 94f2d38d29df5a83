"""Hierarchies and walks whose answers are known: default fits of each, and what they claim wrongly.

    python examples/benchmarks/linear_gaussian.py --models nested,walk --seeds 3
    python examples/benchmarks/linear_gaussian.py --models groups --prior HalfCauchy --spread 0.1 --plain

All latents but one to three scales are normal given these, and so are the data. So log p(x) is a quadratic in the
latents, of which differences of its gradient give precision and mean exactly, and quadrature over the log scales gives
the evidence and all marginals. A row tells the verdict, and the worst error of a scale's or latent's mean (.1 sd is
allowed), of P(quantity ≤ its 5 / 50 / 95 % point) (.015 / .03 / .015) and of the log evidence (.1), as a multiple of
what is allowed: a claim with one above 1 is false.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

import vi_flows as vf
from vi_flows.inference.estimate.evaluate import value_and_grad
from vi_flows.inference.estimate.psis import resampling_weights
from vi_flows.inference.estimate.quantities import PROBABILITIES, carrying

PRIORS: dict[str, Callable[[], Any]] = {
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "Exponential": lambda: dist.Exponential(1.0),
    "Gamma": lambda: dist.Gamma(2.0, 2.0),
    "InverseGamma": lambda: dist.InverseGamma(2.0, 1.0),
}
RANGE = (-10.0, 6.0)  # of log scales
COARSE, FINE = {1: 200, 2: 60, 3: 24}, {1: 1500, 2: 160, 3: 48}  # points along each of so many scales
FAR = 18.0  # nats below the top, from where a scale's marginal counts as 0
LIMITS = torch.tensor([0.015, 0.03, 0.015]).double()
MEAN, EVIDENCE = 0.1, 0.1


@dataclass
class Exact:
    """Means, sds and 5, 50 and 95 % points of every coordinate of x, and the log evidence."""

    mean: Tensor
    sd: Tensor
    points: Tensor
    log_evidence: float


def exact(target: vf.PyroModel) -> Exact:
    """By quadrature over the coordinates of scales (those of positive sites), all others being normal given them."""
    few = torch.tensor([i for s in target.sites for i in range(s.start, s.stop) if not s.is_identity])
    many = torch.tensor([i for i in range(target.dim) if i not in few])
    axes = [torch.linspace(*RANGE, COARSE[len(few)]).double() for _ in few]
    for fine in (True, False):
        eta = torch.cartesian_prod(*axes).reshape(-1, len(few))
        log_z, mean, sd = given(target, eta, few, many, moments=not fine)
        shaped = log_z.reshape([len(axis) for axis in axes])
        along = [shaped.movedim(k, -1).reshape(-1, len(axis)).logsumexp(0) for k, axis in enumerate(axes)]
        if fine:
            ends = [axis[(m > m.max() - FAR).nonzero()[[0, -1], 0]] for axis, m in zip(axes, along, strict=True)]
            axes = [torch.linspace(float(a) - 0.3, float(b) + 0.3, FINE[len(few)]).double() for a, b in ends]
    volume = sum(np.log(float(axis[1] - axis[0])) for axis in axes)
    w, dim = log_z.softmax(0), target.dim
    found = Exact(torch.zeros(dim).double(), torch.ones(dim).double(), torch.zeros(3, dim).double(), 0.0)
    found.log_evidence = float(log_z.logsumexp(0)) + volume
    for k, axis in enumerate(axes):
        found.mean[few[k]], found.sd[few[k]], found.points[:, few[k]] = marginal(axis, along[k])
    kept = w > 1e-10
    w, mean, sd = w[kept] / w[kept].sum(), mean[kept], sd[kept]
    found.mean[many] = w @ mean
    found.sd[many] = (w @ (sd.square() + (mean - w @ mean).square())).sqrt()
    found.points[:, many] = points_of(w, mean, sd)
    return found


def points_of(w: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """5, 50 and 95 % points (3, n) of mixtures of normals with weights w (G,), by bisection."""
    low, high = (mean - 8 * sd).amin(0).expand(3, -1), (mean + 8 * sd).amax(0).expand(3, -1)
    for _ in range(50):
        middle = (low + high) / 2
        below = torch.stack([w @ torch.special.ndtr((row - mean) / sd) for row in middle])
        under = below < torch.tensor(PROBABILITIES).double()[:, None]
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return low


def given(target: vf.PyroModel, eta: Tensor, few: Tensor, many: Tensor, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log ∫ p over the many at scales eta (G, d), as (G,); their means and sds (G, n) given these."""
    parts = []
    for rows in eta.split(max(4000 // len(many), 1)):
        x = torch.zeros(len(rows), len(many) + 1, target.dim).double()
        x[..., few] = rows[:, None]
        x[:, torch.arange(len(many)), many] = 1.0  # the last row stays at 0
        value, grad = value_and_grad(target, x.reshape(-1, target.dim))
        grad = grad.reshape(x.shape)[..., many]
        tril = torch.linalg.cholesky(grad[:, -1:] - grad[:, :-1])
        mean = torch.cholesky_solve(grad[:, -1, :, None], tril)[..., 0]
        top = value.reshape(x.shape[:2])[:, -1] + 0.5 * (grad[:, -1] * mean).sum(-1)
        log_z = top - tril.diagonal(dim1=1, dim2=2).log().sum(-1) + 0.5 * len(many) * np.log(2 * np.pi)
        inverse = torch.cholesky_inverse(tril).diagonal(dim1=1, dim2=2).sqrt() if moments else mean
        parts.append((log_z, mean, inverse))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def marginal(axis: Tensor, log_p: Tensor) -> tuple[float, float, Tensor]:
    """Mean, sd and points of a log scale, from its log density on an axis."""
    fine = np.linspace(float(axis[0]), float(axis[-1]), 20_001)
    p = np.exp(CubicSpline(axis.numpy(), log_p.numpy() - float(log_p.max()))(fine))
    p /= p.sum()
    mean = p @ fine
    points = np.interp(PROBABILITIES, p.cumsum() - p / 2, fine)
    return mean, float(np.sqrt(p @ (fine - mean) ** 2)), torch.from_numpy(points)


def error(posterior: vf.Posterior, written: vf.PyroModel, known: Exact) -> tuple[float, str]:
    """The worst error, as a multiple of what is allowed, and whose it is."""
    kept = carrying(posterior.proposal.log_w)  # others may lie so far out that values overflow
    x = posterior.proposal.x[kept]
    if posterior.settings.is_model:
        x = written.unconstrain(posterior.target.constrain(x))
    w = resampling_weights(posterior.proposal.log_w)[kept].softmax(0)
    off = ((w @ x - known.mean) / known.sd / MEAN).abs()
    below = torch.stack([w @ (x <= row).double() for row in known.points])
    share = (below - torch.tensor(PROBABILITIES).double()[:, None]).abs() / LIMITS[:, None]
    each = torch.cat([off[None], share])
    worst = int(each.argmax())
    what = ("mean", "5 %", "50 %", "95 %")[worst // len(off)] + " of " + written.coordinate_names()[worst % len(off)]
    evidence = abs(posterior.log_evidence - known.log_evidence) / EVIDENCE
    return (evidence, "log evidence") if evidence > float(each.max()) else (float(each.max()), what)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def scale(name: str, prior: str) -> Tensor:
    return pyro.sample(name, PRIORS[prior]())


def groups(spread: float, prior: str, seed: int, n: int = 20, sizes: int = 1) -> Callable[[], None]:
    """Groups of sizes 1 to ``sizes`` of a common mean, noise 1."""
    count = torch.arange(n) % sizes + 1.0
    y = 1 + spread * noise(seed, n) + noise(seed + 1, n) / count.sqrt()

    def model() -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), scale("tau", prior)
        with pyro.plate("g", n):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, count.rsqrt()), obs=y)

    return model


def nested(spread: float, prior: str, seed: int, districts: int = 5, schools: int = 4) -> Callable[[], None]:
    """Schools in districts, two scales."""
    y = spread * noise(seed, districts) + spread * noise(seed + 1, schools, districts)
    y = y + noise(seed + 2, schools, districts)

    def model() -> None:
        mu, outer, inner = pyro.sample("mu", dist.Normal(0.0, 5.0)), scale("outer", prior), scale("inner", prior)
        with pyro.plate("d", districts):
            a = pyro.sample("a", dist.Normal(mu, outer))
            with pyro.plate("s", schools):
                b = pyro.sample("b", dist.Normal(a, inner))
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    return model


def crossed(spread: float, prior: str, seed: int, rows: int = 6, columns: int = 5) -> Callable[[], None]:
    """A table with effects of rows and columns."""
    y = 1 + spread * noise(seed, rows, 1) + spread * noise(seed + 1, columns) + noise(seed + 2, rows, columns)

    def model() -> None:
        mu, first, second = pyro.sample("mu", dist.Normal(0.0, 5.0)), scale("first", prior), scale("second", prior)
        over_rows, over_columns = pyro.plate("r", rows, dim=-2), pyro.plate("c", columns, dim=-1)
        with over_rows:
            a = pyro.sample("a", dist.Normal(0.0, first))
        with over_columns:
            b = pyro.sample("b", dist.Normal(0.0, second))
        with over_rows, over_columns:
            pyro.sample("y", dist.Normal(mu + a + b, 1.0), obs=y)

    return model


def slopes(spread: float, prior: str, seed: int, n: int = 8) -> Callable[[], None]:
    """Varying intercepts and slopes with independent scales, four rows in each group."""
    x = torch.linspace(-1, 1, 4).double()[:, None]
    y = 1 + spread * noise(seed, n) + (0.5 + spread * noise(seed + 1, n)) * x + noise(seed + 2, 4, n)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        sd = pyro.sample("sd", PRIORS[prior]().expand([2]).to_event(1))
        with pyro.plate("g", n):
            b = pyro.sample("b", dist.Normal(mean, sd).to_event(1))
            with pyro.plate("rows", 4):
                pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x, 1.0), obs=y)

    return model


def walk(spread: float, prior: str, seed: int, length: int = 25, phi: float = 1.0) -> Callable[[], None]:
    """A random walk, or an AR(1), in a loop, of unknown innovation scale."""
    y = spread * noise(seed, length).cumsum(0) + noise(seed + 1, length)

    def model() -> None:
        tau = scale("tau", prior)
        at = pyro.sample("x_0", dist.Normal(0.0, 2.0))
        for t in range(length):
            at = pyro.sample(f"x_{t + 1}", dist.Normal(phi * at, tau))
            pyro.sample(f"y_{t}", dist.Normal(at, 1.0), obs=y[t])

    return model


def path(spread: float, prior: str, seed: int, length: int = 25) -> Callable[[], None]:
    """The walk as one site under a factor, centred: no family tells its scale."""
    y = spread * noise(seed, length).cumsum(0) + noise(seed + 1, length)

    def model() -> None:
        tau = scale("tau", prior)
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([length]).to_event(1).mask(False))
        pyro.factor("steps", dist.Normal(0.0, tau).log_prob(x[..., 1:] - x[..., :-1]).sum(-1))
        pyro.factor("first", dist.Normal(0.0, 2.0).log_prob(x[..., 0]))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    return model


def single(spread: float, prior: str, seed: int, n: int = 15) -> Callable[[], None]:
    """One row in each group, of unknown noise, whose true scale is ``spread``: a neck where the noise is small."""
    y = 1 + noise(seed, n) + spread * noise(seed + 1, n)

    def model() -> None:
        mu, tau, sigma = pyro.sample("mu", dist.Normal(0.0, 5.0)), scale("tau", "HalfNormal"), scale("sigma", prior)
        with pyro.plate("g", n):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


def level(spread: float, prior: str, seed: int, length: int = 25) -> Callable[[], None]:
    """A walk seen with noise, both of unknown scales, of which that of the noise is ``spread``."""
    y = noise(seed, length).cumsum(0) + spread * noise(seed + 1, length)

    def model() -> None:
        tau, sigma = scale("tau", "HalfNormal"), scale("sigma", prior)
        at = pyro.sample("x_0", dist.Normal(0.0, 2.0))
        for t in range(length):
            at = pyro.sample(f"x_{t + 1}", dist.Normal(at, tau))
            pyro.sample(f"y_{t}", dist.Normal(at, sigma), obs=y[t])

    return model


MODELS: dict[str, Callable[[float, str, int], Callable[[], None]]] = {
    "groups": groups,
    "few": lambda *how: groups(*how, n=3),
    "unequal": lambda *how: groups(*how, n=15, sizes=12),
    "nested": nested,
    "crossed": crossed,
    "slopes": slopes,
    "walk": walk,
    "ar": lambda *how: walk(*how, phi=0.8),
    "path": path,
    "single": single,
    "level": level,
    "groups_100": lambda *how: groups(*how, n=100),
    "nested_10": lambda *how: nested(*how, districts=10, schools=6),
    "crossed_40": lambda *how: crossed(*how, rows=40, columns=30),
    "path_120": lambda *how: path(*how, length=120),
    "walk_60": lambda *how: walk(*how, length=60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--prior", default="HalfNormal", help=f"of the scales: {', '.join(PRIORS)}")
    parser.add_argument("--spread", type=float, default=0.2, help="the scale that makes the data, in sds of the noise")
    parser.add_argument("--data", type=int, default=0, metavar="SEED", help="of the data")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="fits of each, seeds 0 to N - 1")
    parser.add_argument("--plain", action="store_true", help="give the density alone, without its trace")
    parser.add_argument("--as-written", action="store_true", help="fit with reparam=False")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':<12}{'prior':<13}{'spread':>6}{'D':>5} seed  {'verdict':<12}{'worst':>6}{'CPU s':>8}{'s':>6}")
    for name in chosen.models.split(","):
        if name not in MODELS or chosen.prior not in PRIORS:
            raise SystemExit(f"expected --models {', '.join(MODELS)}; --prior {', '.join(PRIORS)}")
        model = MODELS[name](chosen.spread, chosen.prior, 1000 * chosen.data)
        written = vf.PyroModel(model)
        known = exact(written)
        for seed in range(chosen.seeds):
            row(name, chosen, model, written, known, seed)


def row(name: str, chosen: Any, model: Any, written: vf.PyroModel, known: Exact, seed: int) -> None:
    """Fit once, and print what came of it."""
    cpu, began = time.process_time(), time.monotonic()
    target = vf.LogDensity(written.log_prob, written.dim) if chosen.plain else model
    posterior = vf.fit(target, seed=seed, progress=False, reparam=not chosen.as_written)
    cpu, wall = time.process_time() - cpu, time.monotonic() - began
    worst, what = error(posterior, written, known)
    status, failed = posterior.verdict.status, [c.name for c in posterior.verdict.checks if not c.passed]
    claimed = status != "unreliable"
    kind = "FALSE" if claimed and worst > 1 else "alarm" if worst < 1 and not claimed else ""
    shown = f"{name:<12}{chosen.prior:<13}{chosen.spread:>6}{written.dim:>5} {seed:>4}  {status:<12}{worst:>6.2f}"
    print(f"{shown}{cpu:>8.1f}{wall:>6.0f}  {what}; {kind} {', '.join(failed)}", flush=True)


if __name__ == "__main__":
    main()
