"""Fits of data whose parameters are known: their ranks and verdicts in rows, and what these say of claims."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...running import seeded
from ...targets.pyro_model import PyroModel
from .ranks import CONFIDENCE, TESTS, Rate, Uniformity, Values, normalised_ranks

# of a verdict, and of a row: ranks and false claims are counted over the first ones
CLAIMED, STATUSES = ("reliable", "corrected"), ("reliable", "corrected", "unreliable", "error")
RANK_DRAWS = 4000  # of the posterior, among which a true value is ranked: ranks are then certain to .008
COVERAGE_LEVELS = (0.5, 0.9)  # of the central intervals whose coverage is told: middle and tails, for reading only
# by chance, at most this share of right posteriors excludes the truth: higher, and right claims are counted as false;
# lower, and only gross errors count
EXCLUDED = 0.01
POWER_80 = 0.842  # normal quantile of the power by which "would have been seen" is meant
DENSITY = "log density"  # the name by which log p is ranked beside the sites: it sees what no single one does
# added to a fit's seed: parameters, data and ranks must not come from the random numbers of the fit, nor of each other
DATA_SEED, RANK_SEED = 2**31, 2**30

Quantities = Callable[[Values], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Refit:
    """One fit to data made by known values: its verdict, and where these values rank.

    seed: of data and fit. status: of the verdict, or "error" where the fit raised (``message`` says what). ranks: by
    quantity, the share of posterior draws below the true value, ties and the gaps between draws broken at random: under
    the right posterior uniform on (0, 1), and left out where a quantity is NaN. failed: checks not passed.
    """

    seed: int
    status: str
    cpu_seconds: float
    ranks: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    message: str = ""

    @property
    def claimed(self) -> bool:
        return self.status in CLAIMED

    @property
    def p_value(self) -> float:
        """Of the true values under the posterior: the smallest of the quantities' two-sided ones, times their number
        (Bonferroni)."""
        smallest = min((2 * min(u, 1 - u) for u in self.ranks.values()), default=1.0)
        return min(1.0, len(self.ranks) * smallest)

    @property
    def excludes(self) -> bool:
        """Whether a true value lies outside the quantities' joint 99 % intervals: right posteriors do so in at most 1 %
        of cases."""
        return self.p_value < EXCLUDED


def measured(
    seed: int,
    simulated: Callable[[], tuple[Values, PyroModel]],
    fit: Callable[[PyroModel, int], Any],
    quantities: Quantities | None,
) -> Refit:
    """The row of one fit; one that raises is a row too.

    simulated: draws true values, each (1, *shape), and the target with the data that they make, from torch's global
    random numbers. fit: (target, seed) -> posterior, whatever has ``sample(n)`` and ``verdict``.
    """
    began = time.process_time()
    try:
        with seeded(seed + DATA_SEED):
            truth, target = simulated()
        posterior = fit(target, seed)
        seconds = time.process_time() - began
        with seeded(seed + RANK_SEED):
            draws = _quantities(posterior.sample(RANK_DRAWS), target, quantities)
            ranks = normalised_ranks(draws, _quantities(truth, target, quantities))
    except Exception as error:  # whatever it is, such data would have brought it about
        return Refit(seed, "error", time.process_time() - began, message=f"{type(error).__name__}: {error}")
    failed = [check.name for check in posterior.verdict.checks if not check.passed]
    return Refit(seed, posterior.verdict.status, seconds, ranks, failed)


def collect(
    count: int,
    seed: int,
    measure: Callable[[int], Refit],
    kept: Iterable[Refit],
    report: Callable[[Refit], None] | None,
) -> list[Refit]:
    """measure(s) for count seeds from seed on, but for those that an earlier run has kept; failed ones are tried again.

    report: is called with every row.
    """
    known = {row.seed: row for row in kept if row.status != "error"}
    rows = []
    for s in range(seed, seed + count):
        rows.append(row := known.get(s) or measure(s))
        if report is not None:
            report(row)
    return rows


def point(values: Values) -> Values:
    """The values of a single draw, without their leading dimension."""
    return {name: value[0] for name, value in values.items()}


def _quantities(values: Values, target: PyroModel, quantities: Quantities | None) -> Values:
    """The latent sites and the log density of target there (N, ...), or what the user's function gives."""
    if quantities is not None:
        return dict(quantities(values))
    latent = {name: values[name] for name in target.names}
    try:
        density = target.log_prob(target.unconstrain(latent))
    except ValueError:  # a draw on the boundary of its support, by rounding
        density = torch.full((len(next(iter(latent.values()))),), math.nan)
    return latent | {DENSITY: density.detach()}


@dataclass(frozen=True)
class RankCheck:
    """Ranks over rows, those of the claimed fits apart: a claim does not depend on the truth behind its data, so that
    right claims have uniform ranks by themselves. Fits that raised claim nothing and have no ranks."""

    rows: list[Refit]

    @property
    def claims(self) -> list[Refit]:
        return [row for row in self.rows if row.claimed]

    @property
    def fits(self) -> list[Refit]:
        return [row for row in self.rows if row.status != "error"]

    @property
    def false_claims(self) -> Rate:
        """Claimed fits that exclude the truth, among the claimed: what exceeds 1 % is wrong, though not all that is
        wrong excludes the truth."""
        return Rate(sum(row.excludes for row in self.claims), len(self.claims))

    def quantities(self, claimed: bool = True) -> list[Uniformity]:
        """The ranks of each quantity, over the claimed fits or over all."""
        rows = self.claims if claimed else self.fits
        names = dict.fromkeys(name for row in rows for name in row.ranks)
        found = {name: [row.ranks[name] for row in rows if name in row.ranks] for name in names}
        return [Uniformity(name, torch.tensor(u, dtype=torch.float64)) for name, u in found.items()]

    def coverage(self, level: float, claimed: bool = True) -> tuple[float, float]:
        """Mean coverage over quantities of the central intervals of a level, and its standard error over fits."""
        rows = [row for row in (self.claims if claimed else self.fits) if row.ranks]
        held = [sum(abs(2 * u - 1) < level for u in row.ranks.values()) / len(row.ranks) for row in rows]
        mean = statistics.fmean(held) if held else math.nan
        return mean, statistics.stdev(held) / math.sqrt(len(held)) if len(held) > 1 else math.nan

    def departures(self, claimed: bool = True) -> list[str]:
        """What departs from uniform ranks, as sentences; by chance one of all quantities and tests in 5 % of cases."""
        found = self.quantities(claimed)
        limit = (1 - CONFIDENCE) / (TESTS * max(len(found), 1))
        words = {
            "offset": lambda q: f"true values lie {q.offset:+.2f} ± {q.offset_se:.2f} posterior sds off the centre",
            "spread": lambda q: f"true values scatter {q.spread:.2f} ± {q.spread_se:.2f} times as far as they should",
            "distance": lambda q: f"the ranks' ECDF is {q.distance:.2f} off (95 % band {q.band:.2f})",
        }
        return [f"{q.name}: {words[test](q)} (p {p:.1g})" for q in found for test, p in q.p_values.items() if p < limit]

    @property
    def resolution(self) -> float:
        """The offset, in posterior sds, that so many claims show with 80 % power; a relative error in sd of this over
        √2."""
        from scipy.stats import norm

        count = max(len(self.quantities()), 1)
        critical = float(norm.isf((1 - CONFIDENCE) / (2 * TESTS * count)))
        return (critical + POWER_80) / math.sqrt(len(self.claims)) if self.claims else math.inf

    def table(self) -> str:
        """Statuses, then coverage, offset, spread and ECDF distance of each quantity: of claims, and of all fits."""
        counts = Counter(row.status for row in self.rows)
        seconds = sum(row.cpu_seconds for row in self.rows)
        lines = [", ".join(f"{counts[s]} {s}" for s in STATUSES) + f"; {seconds:.0f} CPU s"]
        for title, claimed in (("claimed fits", True), ("all fits", False)):
            if claimed or len(self.fits) > len(self.claims):
                head = "".join(f"{f'in {level:.0%}':<20}" for level in COVERAGE_LEVELS)
                lines.append(f"{title:<16}{'n':>4}  {head}{'offset ± se':>14}{'spread ± se':>14}  ECDF off, band, p")
                lines += [_line(quantity) for quantity in self.quantities(claimed)]
                lines.append("departures: " + ("; ".join(self.departures(claimed)) or "none"))
        return "\n".join([*lines, f"claims that exclude the truth (1 % by chance): {self.false_claims}"])

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the rows, from which :meth:`from_dict` makes it again, and the figures of the claims."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "false_claims": {**vars(self.false_claims), "at_most": self.false_claims.upper},
            "departures": self.departures(),
            "quantities": [_figures(quantity) for quantity in self.quantities()],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RankCheck:
        """What :meth:`to_dict` gave, also after a way through JSON."""
        own = {f.name: plain[f.name] for f in dataclasses.fields(cls)}
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
        return cls(**own | {"rows": [Refit(**row) for row in plain["rows"]]})


def percent(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.0%} ({low:.0%} to {high:.0%})"


def _line(quantity: Uniformity) -> str:
    cells = "".join(f"{percent(quantity.coverage(level)):<20}" for level in COVERAGE_LEVELS)
    offset = f"{quantity.offset:+.2f} ± {quantity.offset_se:.2f}"
    spread = f"{quantity.spread:.2f} ± {quantity.spread_se:.2f}"
    ecdf = f"{quantity.distance:.2f}, {quantity.band:.2f}, {quantity.p_values['distance']:.2f}"
    return f"{quantity.name[:15]:<16}{len(quantity.u):>4}  {cells}{offset:>14}{spread:>14}  {ecdf}"


def _figures(quantity: Uniformity) -> dict[str, Any]:
    """A quantity's figures; null for a spread of one fit."""
    numbers = ("offset", "offset_se", "spread", "spread_se", "distance", "band")
    plain = {name: getattr(quantity, name) for name in numbers}
    return {
        "name": quantity.name,
        "n": len(quantity.u),
        "coverage": {f"{level:g}": vars(quantity.coverage(level)) for level in COVERAGE_LEVELS},
        **{name: value if math.isfinite(value) else None for name, value in plain.items()},
        "p_values": quantity.p_values,
    }
