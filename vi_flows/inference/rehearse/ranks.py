"""Is the truth like a draw? The rank of a known value among posterior draws, and how ranks over many fits err."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimate.quantities import flatten

CONFIDENCE = 0.95  # of intervals, bands and "at most": the usual one; higher widens what k refits can say
TESTS = 3  # of each quantity: offset, spread, distribution function; without this factor chance departs more often

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Rate:
    """count of total, with the exact interval of a binomial share (Clopper & Pearson 1934)."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval; (0, 1) of nothing."""
        from scipy.stats import binomtest  # takes a while to import

        if not self.total:
            return 0.0, 1.0
        found = binomtest(self.count, self.total).proportion_ci(CONFIDENCE, method="exact")
        return float(found.low), float(found.high)

    @property
    def upper(self) -> float:
        """The one-sided 95 % bound: "at most"; 1 of nothing."""
        from scipy.stats import binomtest

        if not self.total:
            return 1.0
        return float(binomtest(self.count, self.total, alternative="less").proportion_ci(CONFIDENCE).high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.total}, {self.value:.1%} ({low:.1%} to {high:.1%})"


def normalised_ranks(draws: Values, truth: Values) -> dict[str, float]:
    """By scalar quantity, (#{draws < truth} + U (#{draws = truth} + 1)) / (L + 1), U uniform: exactly uniform if the
    truth is one more draw like the L others (Talts et al. 2018). Left out: NaN, and what truth and all draws share."""
    names, theta = flatten(draws)
    theta_star = flatten(truth)[1][0]
    below = (theta < theta_star).sum(0)
    equal = (theta == theta_star).sum(0)
    u = (below + torch.rand(len(names), dtype=torch.float64) * (equal + 1)) / (len(theta) + 1)
    kept = ~theta.isnan().any(0) & ~theta_star.isnan() & (equal < len(theta))
    return {name: float(u[i]) for i, name in enumerate(names) if kept[i]}


@dataclass(frozen=True, eq=False)
class Uniformity:
    """How the ranks u (n,) of one quantity depart from uniform ones, as effect sizes with their errors.

    With z = Φ⁻¹(u), a standard normal if all is right: offset, mean z, is how far true values lie above the posterior's
    centre, in its sds; spread, the sd of z, is how much wider than the posterior they scatter: 2 where posterior sds
    are half of what they should be.
    """

    name: str
    u: Tensor

    def coverage(self, level: float) -> Rate:
        """How often the central interval of this level held the true value."""
        return Rate(int(((2 * self.u - 1).abs() < level).sum()), len(self.u))

    @property
    def z(self) -> Tensor:
        return torch.special.ndtri(self.u)

    @property
    def offset(self) -> float:
        return float(self.z.mean())

    @property
    def offset_se(self) -> float:
        return self.spread / math.sqrt(len(self.u))

    @property
    def spread(self) -> float:
        return float(self.z.std()) if len(self.u) > 1 else math.nan

    @property
    def spread_se(self) -> float:
        return self.spread / math.sqrt(2 * (len(self.u) - 1)) if len(self.u) > 1 else math.nan

    @property
    def distance(self) -> float:
        """Kolmogorov's: the largest difference of the ranks' distribution function from the uniform one."""
        ordered, n = self.u.sort().values, len(self.u)
        steps = torch.arange(n + 1, dtype=ordered.dtype) / n
        return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())

    @property
    def band(self) -> float:
        """What 95 % of such distances stay below if all is right: the simultaneous band of the ECDF difference."""
        from scipy.stats import kstwo

        return float(kstwo.ppf(CONFIDENCE, len(self.u)))

    @property
    def p_values(self) -> dict[str, float]:
        """Of the exact tests of offset (normal), spread (Σz² is χ² of n degrees) and distance (Kolmogorov's)."""
        from scipy.stats import chi2, kstwo, norm

        n = len(self.u)
        square = float(self.z.square().sum())
        return {
            "offset": float(2 * norm.sf(abs(self.offset) * math.sqrt(n))),
            "spread": float(2 * min(chi2.cdf(square, n), chi2.sf(square, n))),
            "distance": float(kstwo.sf(self.distance, n)),
        }
