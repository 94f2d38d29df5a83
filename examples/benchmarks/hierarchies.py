"""Models of many latents that are nearly Gaussian given few scales: `vf.fit` on each, beside NUTS of NumPyro.

    python examples/benchmarks/hierarchies.py --models volatility,counts --seeds 3 --json rows.json
    python examples/benchmarks/hierarchies.py --models volatility --nuts        # where numpyro is installed

Data are simulated here, from `--data-seed`. Each log density is written once, over unconstrained coordinates, for torch
and for JAX, so that both are given the same thing. A row tells D, the verdict, CPU seconds, the effective sample size
of the weighted draws, CPU seconds per 1,000 of these, and the peak memory of the process; with `--nuts` the same of one
chain, its least effective sample size over all coordinates, and the largest difference between the two in means (in
sd) and in log sds.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vi_flows as vf
from vi_flows.inference.estimate.weights import effective_sample_size

Density = Callable[[Any, Any], Any]  # (torch or jax.numpy, x (..., dim)) -> (...)
WARMUP, STEPS = 1000, 2000  # of NUTS
APART = 1000  # between the generators of one data seed and of the next: more than there are models


def normal(value: Any, sd: Any = 1.0) -> Any:
    """Σ log N(value; 0, sd) over the last axis, for a constant sd, up to a constant."""
    return -0.5 * ((value / sd) ** 2).sum(-1)


def half_normal(xp: Any, log_scale: Any, scale: float) -> Any:
    """log density of log σ under σ ~ HalfNormal(scale), up to a constant."""
    return -0.5 * (xp.exp(log_scale) / scale) ** 2 + log_scale


def volatility(length: int, data_seed: int) -> tuple[Density, int]:
    """Stochastic volatility: y ~ N(0, e^h), h an AR(1) with mean μ, persistence φ and innovations of sd σ, centred."""
    g, phi, sigma = np.random.default_rng(1 + APART * data_seed), 0.97, 0.18
    h = np.zeros(length)
    h[0] = g.normal() * sigma / np.sqrt(1 - phi**2)
    for t in range(1, length):
        h[t] = phi * h[t - 1] + sigma * g.normal()
    y2 = np.exp(h - 9) * g.normal(size=length) ** 2

    def density(xp: Any, x: Any) -> Any:
        mu, phi, log_sigma, h = x[..., :1], xp.tanh(x[..., 1:2]), x[..., 2:3], x[..., 3:]
        data = constant(xp, y2)
        off, scale = h - mu, xp.exp(log_sigma)
        steps = normal((off[..., 1:] - phi * off[..., :-1]) / scale) + normal(
            off[..., :1] * (1 - phi**2) ** 0.5 / scale
        )
        rest = 20 * xp.log1p(phi) + 1.5 * xp.log1p(-phi) + 0.5 * xp.log1p(-(phi**2)) - length * log_sigma
        prior = rest + half_normal(xp, log_sigma, 0.5) - 0.5 * ((mu + 9) / 3) ** 2
        return prior[..., 0] + steps - 0.5 * (h + data * xp.exp(-h)).sum(-1)

    return density, length + 3


def seasonal(length: int, data_seed: int) -> tuple[Density, int]:
    """A local level and a season of period 4, both walks of unknown scales, seen with noise, centred."""
    g = np.random.default_rng(2 + APART * data_seed)
    level, season = np.cumsum(0.1 * g.normal(size=length)), np.zeros(length)
    season[:3] = 1.0, -0.5, 0.2
    for t in range(3, length):
        season[t] = -season[t - 3 : t].sum() + 0.05 * g.normal()
    y = level + season + 0.3 * g.normal(size=length)

    def density(xp: Any, x: Any) -> Any:
        scales, level, season = x[..., :3], x[..., 3 : 3 + length], x[..., 3 + length :]
        sd = xp.exp(scales)
        four = season[..., 3:] + season[..., 2:-1] + season[..., 1:-2] + season[..., :-3]
        prior = half_normal(xp, scales, 1.0).sum(-1) + normal(level[..., :1], 3.0) + normal(season[..., :3], 3.0)
        walks = normal((level[..., 1:] - level[..., :-1]) / sd[..., :1]) + normal(four / sd[..., 1:2])
        counts = (length - 1) * scales[..., 0] + (length - 3) * scales[..., 1] + length * scales[..., 2]
        return prior + walks - counts + normal((constant(xp, y) - level - season) / sd[..., 2:3])

    return density, 2 * length + 3


def counts(length: int, data_seed: int) -> tuple[Density, int]:
    """Poisson counts whose log rate is a random walk of unknown scale, centred."""
    g = np.random.default_rng(3 + APART * data_seed)
    y = g.poisson(np.exp(1.5 + np.cumsum(0.08 * g.normal(size=length)))).astype(float)

    def density(xp: Any, x: Any) -> Any:
        log_sd, h = x[..., :1], x[..., 1:]
        walk = normal((h[..., 1:] - h[..., :-1]) / xp.exp(log_sd)) - (length - 1) * log_sd[..., 0]
        prior = half_normal(xp, log_sd, 0.5)[..., 0] + normal(h[..., :1] - 1, 2.0)
        return prior + walk + (constant(xp, y) * h - xp.exp(h)).sum(-1)

    return density, length + 1


def responses(items: int, persons: int, data_seed: int) -> tuple[Density, int]:
    """A 2-PL model of item responses: logits a_i (θ_p − b_i), log a ~ N(0, σ_a), b ~ N(μ, σ_b), θ ~ N(0, 1)."""
    g = np.random.default_rng(4 + APART * data_seed)
    a, b, theta = np.exp(0.4 * g.normal(size=items)), g.normal(size=items), g.normal(size=(persons, 1))
    sign = np.where(g.uniform(size=(persons, items)) < 1 / (1 + np.exp(-a * (theta - b))), 1.0, -1.0)

    def density(xp: Any, x: Any) -> Any:
        mu, log_sd_b, log_sd_a = x[..., :1], x[..., 1:2], x[..., 2:3]
        log_a, b, theta = x[..., 3 : 3 + items], x[..., 3 + items : 3 + 2 * items], x[..., 3 + 2 * items :]
        prior = half_normal(xp, log_sd_b, 2.0) + half_normal(xp, log_sd_a, 1.0) - items * (log_sd_a + log_sd_b)
        of_items = normal(log_a / xp.exp(log_sd_a)) + normal((b - mu) / xp.exp(log_sd_b)) + normal(mu, 2.0)
        logits = xp.exp(log_a)[..., None, :] * (theta[..., None] - b[..., None, :])
        seen = -xp.logaddexp(constant(xp, 0 * sign), -constant(xp, sign) * logits)
        return prior[..., 0] + of_items + normal(theta) + seen.sum(-1).sum(-1)

    return density, 3 + 2 * items + persons


def slopes(groups: int, rows: int, centred: bool, data_seed: int) -> tuple[Density, int]:
    """Varying intercepts and slopes of many small groups, normal data."""
    g = np.random.default_rng(5 + APART * data_seed)
    group = np.concatenate([np.arange(groups), g.integers(0, groups, rows - groups)])
    floor = (g.uniform(size=rows) < 0.2).astype(float)
    intercept, slope = 1.5 + 0.3 * g.normal(size=groups), -0.7 + 0.3 * g.normal(size=groups)
    y = intercept[group] + slope[group] * floor + 0.75 * g.normal(size=rows)

    def density(xp: Any, x: Any) -> Any:
        mean_a, mean_b, scales = x[..., :1], x[..., 1:2], x[..., 2:5]
        sd, a, b = xp.exp(scales), x[..., 5 : 5 + groups], x[..., 5 + groups :]
        prior = normal(x[..., :2], 10.0) + half_normal(xp, scales, 1.0).sum(-1)
        if centred:
            prior = prior + normal((a - mean_a) / sd[..., :1]) + normal((b - mean_b) / sd[..., 1:2])
            prior = prior - groups * (scales[..., 0] + scales[..., 1])
        else:
            prior = prior + normal(a) + normal(b)
            a, b = mean_a + sd[..., :1] * a, mean_b + sd[..., 1:2] * b
        off = constant(xp, y) - a[..., group] - b[..., group] * constant(xp, floor)
        return prior + normal(off / sd[..., 2:3]) - rows * scales[..., 2]

    return density, 5 + 2 * groups


def crossed(first: int, second: int, data_seed: int) -> tuple[Density, int]:
    """Poisson counts in a table with crossed effects of rows and columns."""
    g = np.random.default_rng(6 + APART * data_seed)
    rate = np.exp(0.5 + 0.5 * g.normal(size=(first, 1)) + 0.3 * g.normal(size=(1, second)))
    y = g.poisson(rate).astype(float)

    def density(xp: Any, x: Any) -> Any:
        mu, scales, a, b = x[..., :1], x[..., 1:3], x[..., 3 : 3 + first], x[..., 3 + first :]
        sd = xp.exp(scales)
        prior = (
            normal(mu, 3.0) + half_normal(xp, scales, 1.0).sum(-1) - first * scales[..., 0] - second * scales[..., 1]
        )
        prior = prior + normal(a / sd[..., :1]) + normal(b / sd[..., 1:2])
        log_rate = mu[..., None] + a[..., :, None] + b[..., None, :]
        return prior + (constant(xp, y) * log_rate - xp.exp(log_rate)).sum(-1).sum(-1)

    return density, 3 + first + second


MODELS: dict[str, Callable[[int], tuple[Density, int]]] = {
    "volatility": lambda seed: volatility(500, seed),
    "volatility_1000": lambda seed: volatility(1000, seed),
    "seasonal": lambda seed: seasonal(200, seed),
    "counts": lambda seed: counts(2000, seed),
    "responses": lambda seed: responses(20, 100, seed),
    "slopes": lambda seed: slopes(85, 919, False, seed),
    "slopes_centred": lambda seed: slopes(85, 919, True, seed),
    "crossed": lambda seed: crossed(30, 40, seed),
}


def constant(xp: Any, values: np.ndarray) -> Any:
    return torch.from_numpy(values) if xp is torch else xp.asarray(values)


def fitted(density: Density, dim: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """A row, and moments (2, dim) of the weighted draws: means and sds."""
    began = time.process_time()
    posterior = vf.fit(vf.LogDensity(lambda x: density(torch, x), dim), seed=seed, progress=False)
    seconds, log_w = time.process_time() - began, posterior.proposal.log_w
    w, x = log_w.softmax(0), posterior.proposal.x
    mean = w @ x
    sd = (w @ (x - mean).square()).sqrt()
    row = {"verdict": posterior.verdict.status, "cpu": seconds, "ess": effective_sample_size(log_w)}
    row["failed"] = [check.name for check in posterior.verdict.checks if not check.passed]
    row |= {"log_evidence": posterior.log_evidence, "log_evidence_se": posterior.log_evidence_se}
    return row | {"flow": posterior.flow_description}, torch.stack([mean, sd]).numpy()


def nuts(density: Density, dim: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """A row of one chain of NumPyro's NUTS, compilation and warm-up included, and its moments."""
    import jax
    import numpyro
    from numpyro.diagnostics import effective_sample_size as ess
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    began = time.process_time()
    kernel = NUTS(potential_fn=lambda x: -density(jax.numpy, x))
    chain = MCMC(kernel, num_warmup=WARMUP, num_samples=STEPS, progress_bar=False)
    start = 0.1 * jax.random.normal(jax.random.key(seed), (dim,))
    chain.run(jax.random.key(seed), init_params=start)
    x = np.asarray(chain.get_samples())
    seconds = time.process_time() - began
    return {"cpu": seconds, "ess": float(ess(x[None]).min())}, np.stack([x.mean(0), x.std(0)])


def line(name: str, dim: int, row: dict[str, Any]) -> str:
    each = 1000 * row["cpu"] / max(row["ess"], 1e-300)
    shown = (
        f"{name:<16}{dim:>5} {row['seed']:>4}  {row['verdict']:<12}{row['cpu']:>8.1f}{row['ess']:>9.0f}{each:>12.2f}"
    )
    shown += f"{row['memory']:>8.0f}"
    return shown + (f"  off by {row['mean']:.3f} sd, log sd {row['log_sd']:.3f}" if "mean" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="fits of each, seeds 0 to N - 1")
    parser.add_argument("--data-seed", type=int, default=0, metavar="K", help="simulate all data from another seed")
    parser.add_argument("--nuts", action="store_true", help="run a chain of NumPyro's NUTS beside them")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows here, after every row")
    chosen = parser.parse_args()
    rows = []
    print(f"{'model':<16}{'D':>5} seed  {'verdict':<12}{'CPU s':>8}{'ESS':>9}{'CPU s/1,000':>12}{'MB':>8}", flush=True)
    for name in chosen.models.split(","):
        if name not in MODELS:
            raise SystemExit(f"--models: expected some of {', '.join(MODELS)}, got {name!r}")
        density, dim = MODELS[name](chosen.data_seed)
        chain, moments = nuts(density, dim, 0) if chosen.nuts else ({}, None)
        if chain:
            print(line(name, dim, {"seed": 0, "verdict": "NUTS", "memory": 0, **chain}), flush=True)
        for seed in range(chosen.seeds):
            row, own = fitted(density, dim, seed)
            row |= {"model": name, "dim": dim, "seed": seed, "data_seed": chosen.data_seed, "nuts": chain}
            row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if moments is not None:
                row["mean"] = float((np.abs(own[0] - moments[0]) / moments[1]).max())
                row["log_sd"] = float(np.abs(np.log(own[1] / moments[1])).max())
            rows.append(row)
            print(line(name, dim, row), flush=True)
            if chosen.json:
                chosen.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
