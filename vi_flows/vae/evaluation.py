"""What a trained VAE is worth on rows that it has not seen: bounds of log p(x), their errors, and what they miss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole
from ..inference.bounds import KHAT_BOUND
from ..inference.estimate.psis import khat
from ..inference.judge.checks import tails
from ..progress import Progress
from ..running import seeded
from .bounds import DECODED_DRAWS, blocks, bound, double, evaluating, log_mean_by_row
from .distributed import ALONE, Workers
from .model import VAE, Terms
from .refine import refine

__all__ = ["Estimate", "Evaluation", "bound", "evaluate"]
ACTIVE = 0.01  # variance over images of a unit's posterior mean (Burda et al. 2016, sec. 5.2)


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, which is that of other images and of other draws."""

    value: float
    se: float

    @classmethod
    def of(cls, rows: Tensor) -> Estimate:
        """Of numbers (N,); the error is NaN for a single row."""
        return cls(float(rows.mean()), float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else math.nan)

    def bits(self, dim: int, levels: int = 1) -> Estimate:
        """Bits per dimension, −log₂ p(x)/dim, for a mean log p(x) in nats.

        levels: 1 where p is a probability of levels; for a density of (k + u)/levels, u uniform on [0, 1), their
        number: a level is 1/levels wide, and E_u log p(x) bounds the logarithm of its probability.
        """
        nats = dim * math.log(2)
        return Estimate(-self.value / nats + math.log2(levels), self.se / nats)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.se:.3f}"


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found on ``rows`` of ``given`` rows, means per image in nats.

    elbo, iwae: lower bounds of log p(x), from ``draws`` draws for each row. reconstruction, kl: E_q[log p(x|z)] and
    KL(q(z|x)‖p(z)), whose difference is the ELBO.
    khat: of the weights p(x, z)/q(z|x) of each image of a random subset, ``khat_draws`` draws each; unseen: the share
    of p(x) that may lie beyond the largest of them (psis.hidden at the upper limit of k̂; at least the largest's own).
    activity: Var_x E_q[z] of each latent unit.
    gap: by how much posteriors of their own raise the ELBO of ``gap_rows`` images; None if that was not asked for.
    bits, elbo_bits: bits per dimension by IWAE and by the ELBO, None where pixels have no grey levels.
    """

    rows: int
    given: int
    draws: int
    seed: int
    elbo: Estimate
    iwae: Estimate
    reconstruction: Estimate
    kl: Estimate
    activity: tuple[float, ...]
    khat_draws: int
    khat: tuple[float, ...]
    unseen: tuple[float, ...]
    gap_rows: int
    gap_steps: int
    gap: Estimate | None
    bits: Estimate | None
    elbo_bits: Estimate | None

    @property
    def active_units(self) -> int:
        return sum(value > ACTIVE for value in self.activity)

    @property
    def sentences(self) -> list[str]:
        """What was found, in words."""
        each = "all" if self.rows == self.given else f"{self.rows:,} (chosen at random) of"
        said = [
            f"The log likelihood of an image is at least {self.iwae} nats on average over {each} {self.given:,} rows: "
            f"IWAE-{self.draws} is a lower bound, and it is {self.iwae.value - self.elbo.value:.3f} above the ELBO.",
            *([f"That is at most {self.bits} bits per dimension."] if self.bits else []),
            *self._of_weights(),
            *self._of_gap(),
            f"{self.active_units} of {len(self.activity)} latent units are active (Var_x E_q[z] > {ACTIVE}).",
        ]
        if not self.active_units:
            said.append("The decoder ignores z (posterior collapse): train with a longer warm-up of the KL's weight.")
        return said

    def _of_weights(self) -> list[str]:
        if not self.khat:
            return []
        high = sum(value > KHAT_BOUND for value in self.khat) / len(self.khat)
        of = f"of {len(self.khat)} images ({self.khat_draws:,} draws each)"
        if high:
            first = f"k̂ is above {KHAT_BOUND} for {high:.1%} {of}: their IWAE bounds are low by an unknown amount."
        else:
            first = f"k̂ is at most {KHAT_BOUND} for all {of}: importance weights correct q(z|x)."
        hidden = [math.log1p(share) for share in self.unseen]
        more = " or more" if max(self.unseen) == 1 else ""
        worst = f"{sum(hidden) / len(hidden):.3f} nats{more} on average, {max(hidden):.3f}{more} for the worst image"
        return [first, f"Weights beyond those drawn may raise these bounds by {worst}."]

    def _of_gap(self) -> list[str]:
        if self.gap is None:
            return []
        how = f"A posterior of its own for each of {self.gap_rows} images ({self.gap_steps} steps, decoder frozen)"
        if self.gap.value > 2 * self.gap.se:
            return [f"{how} raises the ELBO by {self.gap} nats: at least that much is lost to amortisation."]
        return [f"{how} does not raise the ELBO measurably ({self.gap} nats): no amortisation gap was seen."]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"active_units": self.active_units, "sentences": self.sentences}


@dataclass(frozen=True)
class Effort:
    """How many rows and draws an evaluation takes, by the names of arguments of :func:`evaluate`, checked."""

    draws: int
    max_rows: int
    khat_rows: int
    khat_draws: int
    refine_rows: int
    refine_steps: int

    def __post_init__(self) -> None:
        least = {"draws": 2, "max_rows": 1, "khat_rows": 0, "khat_draws": 100, "refine_rows": 0, "refine_steps": 1}
        for name, value in vars(self).items():
            whole(name, value, least[name])


def evaluate(
    vae: VAE,
    x: Tensor,
    draws: int = 100,
    seed: int = 0,
    *,
    max_rows: int | None = None,
    khat_rows: int = 200,
    khat_draws: int = 1000,
    refine_rows: int = 40,
    refine_steps: int = 400,
    dequantised: int | None = None,
    chunk: int = DECODED_DRAWS,
    processes: Workers = ALONE,
    progress: bool = False,
) -> Evaluation:
    """Judge a VAE on rows x (N, dim) that it was not trained on, in random order: a file may be sorted by class.

    The result depends on ``seed`` alone (the gap on the number of processes, too); the generators, and each part's
    train or eval mode, stay as they were. Raises ValueError for values that the likelihood does not have, and counts.

    draws: K, at least 2, of q(z|x) for each row. max_rows: how many rows are used; None: all.
    khat_rows, khat_draws: images whose weights' tails are judged, 0 for none, and draws for each.
    refine_rows, refine_steps: images whose posterior is refined for the amortisation gap, 0 for none, and Adam's steps.
    dequantised: levels of x = (k + u)/levels under a likelihood that is a density, for bits per dimension.
    chunk: draws that are decoded at once. processes: those that share the rows; each has the result.
    progress: show a bar on standard error.
    """
    max_rows = len(x) if max_rows is None else max_rows
    effort = Effort(draws, max_rows, khat_rows, khat_draws, refine_rows, refine_steps)
    whole("dequantised", dequantised or 2, 2)
    vae.likelihood.check(x, "x")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    levels = 1 if vae.likelihood.levels not in (None, 2) else dequantised
    with Progress(progress and processes.first) as bar:
        return _evaluated(Pass(vae, chunk, processes, bar), x[order[:max_rows]], len(x), effort, seed, levels)


def _evaluated(over: Pass, x: Tensor, given: int, effort: Effort, seed: int, levels: int | None) -> Evaluation:
    """The evaluation on rows x of ``given``; bits per dimension where pixels have levels, see :meth:`Estimate.bits`."""
    refined = x[: effort.refine_rows]
    numbers, activity = _bounds(over, x, effort.draws, seed)
    shapes, unseen = _tails(over, x[: effort.khat_rows], effort.khat_draws, seed + 1)
    return Evaluation(
        rows=len(x),
        given=given,
        draws=effort.draws,
        seed=seed,
        **numbers,
        activity=activity,
        khat_draws=effort.khat_draws,
        khat=shapes,
        unseen=unseen,
        gap_rows=len(refined),
        gap_steps=effort.refine_steps,
        gap=_gap(over, refined, effort.refine_steps, seed + 2) if len(refined) else None,
        bits=numbers["iwae"].bits(x.shape[1], levels) if levels else None,
        elbo_bits=numbers["elbo"].bits(x.shape[1], levels) if levels else None,
    )


@dataclass(frozen=True)
class Pass:
    """How rows are gone through: by which VAE, how many draws at once, shared by whom, shown on what."""

    vae: VAE
    chunk: int
    processes: Workers
    bar: Progress

    def terms(self, stage: str, x: Tensor, draws: int) -> Iterator[Terms]:
        """Terms of this process's share of rows x (N, dim)."""
        self.bar.stage(stage, len(self.processes.share(x)))
        for terms in blocks(self.vae, x, draws, self.chunk, self.processes):
            yield terms
            self.bar.advance(terms.z.shape[1])


def _bounds(over: Pass, x: Tensor, draws: int, seed: int) -> tuple[dict[str, Estimate], tuple[float, ...]]:
    """Estimates by name, and Var_x E_q[z] of each unit: the variance of means of draws, less what so few draws add."""
    parts = []
    with evaluating(over.vae), seeded(seed):
        for terms in over.terms("bounds", x, draws):
            log_w, likelihood, z = double(terms.log_w), double(terms.log_likelihood), double(terms.z)
            rows = {"elbo": log_w.mean(0), "iwae": log_mean_by_row(log_w), "reconstruction": likelihood.mean(0)}
            rows["kl"] = rows["reconstruction"] - rows["elbo"]
            parts.append(rows | {"mean": z.mean(0), "noise": z.var(0) / draws})
    found = {name: over.processes.gathered(torch.cat([part[name] for part in parts]), len(x)) for name in parts[0]}
    noise, mean = found.pop("noise").mean(0), found.pop("mean")
    activity = (mean.var(0) - noise).clamp_min(0.0) if len(x) > 1 else torch.zeros_like(noise)
    return {name: Estimate.of(rows) for name, rows in found.items()}, tuple(activity.tolist())


def _tails(over: Pass, x: Tensor, draws: int, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """k̂ of each row's weights, and the share of their sum that may lie beyond the largest."""
    if not len(x):
        return (), ()
    with evaluating(over.vae), seeded(seed):
        weights = [log_w for terms in over.terms("tails", x, draws) for log_w in double(terms.log_w).unbind(1)]
    found = torch.tensor([[khat(log_w), _unseen(log_w)] for log_w in weights], dtype=torch.float64)
    shapes, unseen = over.processes.gathered(found, len(x)).unbind(1)
    return tuple(shapes.tolist()), tuple(unseen.tolist())


def _unseen(log_w: Tensor) -> float:
    """What may lie beyond the largest weight: as much as a tail like that of k̂ holds, or as this weight itself."""
    largest = float((log_w.max() - log_w.logsumexp(0)).exp())
    return min(max(tails(log_w).statistic, largest), 1.0)


def _gap(over: Pass, x: Tensor, steps: int, seed: int, draws: int = 1000) -> Estimate:
    """E_x[ELBO of the row's own posterior − ELBO of q(z|x)], from the same fresh noise."""
    over.bar.stage("refining")
    own = over.processes.share(x)
    refined = refine(over.vae, own, steps=steps, seed=seed)
    gains = refined.bound(draws, seed + 1, over.chunk)[0] - bound(over.vae, own, draws, seed + 1, over.chunk)[0]
    return Estimate.of(over.processes.gathered(gains, len(x)))
