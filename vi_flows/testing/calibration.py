"""calibrate_verdict: how often a claim of the verdict is false, on targets whose answers are known."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole
from ..fitting.fit import fit
from ..fitting.posterior import Posterior
from ..inference.estimate.quantities import PROBABILITIES
from ..inference.judge.check import SPARED
from ..inference.rehearse.ranks import Rate
from ..inference.rehearse.refits import CLAIMED, STATUSES
from .hierarchies import Hierarchy, hierarchy
from .synthetic import TARGET_KINDS, SyntheticTarget, synthetic

NECKS = ("neck", "neck_model")  # hierarchies whose scale may be small: as plain densities, and as Pyro models

TRUTH_DRAWS, POSTERIOR_DRAWS = 200_000, 40_000  # draws: of the truth, and of the posterior beside it
# what makes numbers wrong; the judge's own bounds are not asked, so that they may change
LIMITS = {"log Z": 0.1, "mean": 0.1, "P5": 0.015, "P50": 0.03, "P95": 0.015}


@dataclass(frozen=True)
class CalibrationRow:
    """One fit of one synthetic target, beside the truth.

    kind, seed, dim, target: what was fitted, :func:`known_target`, whose seed was also the fit's. status: of the
    verdict, or "error" where the fit raised (``message`` says what). checks: statistic/bound of each, passed below 1;
    failed: those that did not pass; stopped_by: of these, those without which it would be claimed. errors, own_errors:
    of the weighted draws and log Ẑ, and of unweighted draws of q, as multiples of LIMITS, so that 1 is the largest that
    is right. log_z_error, log_z_se, khat, ess (a share), cpu_seconds: of the fit.
    """

    kind: str
    seed: int
    dim: int
    target: str
    status: str
    cpu_seconds: float
    failed: list[str] = field(default_factory=list)
    stopped_by: list[str] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    own_errors: dict[str, float] = field(default_factory=dict)
    log_z_error: float = math.nan
    log_z_se: float = math.nan
    khat: float = math.nan
    ess: float = math.nan
    message: str = ""

    @property
    def claimed(self) -> bool:
        return self.status in CLAIMED

    @property
    def wrong(self) -> list[str]:
        """What is beyond its limit, of the weighted draws and the evidence."""
        return beyond(self.errors)

    @property
    def right(self) -> bool:
        return self.status != "error" and not self.wrong


@dataclass(frozen=True)
class Calibration:
    """The verdict against the truth, over rows; a fit that raised claims nothing and counts among the fits."""

    rows: list[CalibrationRow]

    @property
    def false_claims(self) -> list[CalibrationRow]:
        return [row for row in self.rows if row.claimed and not row.right]

    @property
    def false_alarms(self) -> list[CalibrationRow]:
        return [row for row in self.rows if row.right and not row.claimed]

    @property
    def false_of_claims(self) -> Rate:
        """False claims among claims: how far a claim is to be trusted."""
        return Rate(len(self.false_claims), sum(row.claimed for row in self.rows))

    @property
    def false_of_fits(self) -> Rate:
        """False claims among all fits."""
        return Rate(len(self.false_claims), len(self.rows))

    @property
    def false_alarm_rate(self) -> Rate:
        """Right but unclaimed, among the right."""
        return Rate(len(self.false_alarms), sum(row.right for row in self.rows))

    @property
    def false_reliable(self) -> Rate:
        """Fits called reliable of which q's own, unweighted draws are wrong."""
        reliable = [row for row in self.rows if row.status == "reliable"]
        return Rate(sum(bool(beyond(row.own_errors)) for row in reliable), len(reliable))

    def table(self) -> str:
        """Right and wrong fits by kind and status, the rates with their 95 % bounds, and what raised false alarms."""
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        lines = [f"{'right/wrong':<12}" + "".join(f"{status:>12}" for status in STATUSES[:3]) + "   error    CPU s"]
        lines += [_line(kind, [row for row in self.rows if row.kind == kind]) for kind in kinds]
        lines += [_line("all", self.rows)] if len(kinds) > 1 else []
        stops = Counter(name for row in self.false_alarms for name in row.stopped_by).most_common()
        return "\n".join(
            [
                *lines,
                f"false claims / claims: {self.false_of_claims}",
                f"false claims / fits: {self.false_of_fits}",
                f"false alarms / right: {self.false_alarm_rate}",
                f"own draws wrong / reliable: {self.false_reliable}",
                "false alarms by failing check: " + (", ".join(f"{name} {n}" for name, n in stops) or "none"),
            ]
        )


def calibrate_verdict(
    n: int,
    seed: int = 0,
    *,
    kinds: Sequence[str] = tuple(TARGET_KINDS),
    kept: Iterable[CalibrationRow] = (),
    report: Callable[[CalibrationRow], None] | None = None,
) -> Calibration:
    """Fit n synthetic targets by ``fit``'s defaults, and tabulate what the verdict claims against the truth.

    A claim, "reliable" or "corrected", is true if all weighted means are within 0.1 sd, probabilities at the true 5, 50
    and 95 % points within .015, .03 and .015 in every coordinate, and the log evidence within 0.1; else it is false.

    Parameters
    ----------
    n, seed: targets of seeds s = seed .. seed + n − 1, the kinds taking turns.
    kinds: of ``synthetic``, and "neck" and "neck_model": hierarchies of 5 to 50 groups whose scale may be small, as
        densities and as Pyro models (:mod:`vi_flows.testing.hierarchies`).
    kept: rows of an earlier run, which are not measured again. report: is called with every row.

    Raises ValueError for n < 1 or an unknown kind.
    """
    whole("n", n, remedy="the number of targets to fit")
    every = (*TARGET_KINDS, *NECKS)
    unknown = [kind for kind in kinds if kind not in every]
    if unknown or not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(every)}, got {unknown or 'none'}")
    known = {(row.kind, row.seed): row for row in kept}
    rows = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        rows.append(row := known.get((kind, seed + i)) or measure(known_target(kind, seed + i)))
        if report is not None:
            report(row)
    return Calibration(rows)


def known_target(kind: str, seed: int) -> SyntheticTarget | Hierarchy:
    """A random target of that kind, with log Z = 0 and exact draws."""
    return hierarchy(kind, seed) if kind in NECKS else synthetic(kind, seed)


def measure(target: SyntheticTarget | Hierarchy) -> CalibrationRow:
    """One fit by default settings, compared with exact draws and log Z = 0; one that raises is a row too."""
    described = {"kind": target.kind, "seed": target.seed, "dim": target.dim, "target": target.how}
    began = time.process_time()
    try:
        posterior = fit(target.target(), seed=target.seed, progress=False)
    except Exception as error:  # whatever it is, it is what a user would have got
        seconds, message = time.process_time() - began, f"{type(error).__name__}: {error}"
        return CalibrationRow(**described, status="error", cpu_seconds=seconds, message=message)
    return compare(posterior, target, described, time.process_time() - began)


def compare(
    posterior: Posterior, target: SyntheticTarget | Hierarchy, described: dict[str, Any], cpu_seconds: float
) -> CalibrationRow:
    """The row of a posterior of a target with log Z = 0 and exact draws."""
    checks, seed = posterior.verdict.checks, described["seed"] + 1
    exact, log_z = target.draws(TRUTH_DRAWS, target.seed), target.log_z_of(posterior.log_evidence)

    def drawn(weighted: bool) -> Tensor:
        return target.points(posterior.sample(POSTERIOR_DRAWS, weighted=weighted, seed=seed))

    return CalibrationRow(
        **described,
        status=posterior.verdict.status,
        cpu_seconds=cpu_seconds,
        failed=[check.name for check in checks if not check.passed],
        stopped_by=[check.name for check in checks if not check.passed and check.role not in SPARED],
        checks={check.name: check.statistic / check.bound for check in checks},
        errors={"log Z": _multiple(abs(log_z), "log Z"), **draw_errors(drawn(weighted=True), exact)},
        own_errors=draw_errors(drawn(weighted=False), exact),
        log_z_error=log_z,
        log_z_se=posterior.log_evidence_se,
        khat=posterior.khat,
        ess=posterior.ess / len(posterior.flow_draws),
    )


def draw_errors(x: Tensor, exact: Tensor) -> dict[str, float]:
    """The largest errors over coordinates of draws x (N, D) against exact ones (M, D), as multiples of LIMITS.

    Of means, in sds of the exact draws; of the shares of x below the exact draws' 5, 50 and 95 % points. With
    N = 40,000 and M = 200,000 chance makes 0.06 of a mean's limit and 0.1 of a probability's; uneven weights more.
    """
    probabilities = exact.new_tensor(PROBABILITIES)
    points = exact.quantile(probabilities, 0)
    mean = ((x.mean(0) - exact.mean(0)).abs() / exact.std(0)).max()
    below = torch.stack([(x <= point).to(x.dtype).mean(0) for point in points])
    off = (below - probabilities[:, None]).abs().amax(1)
    return {name: _multiple(float(error), name) for name, error in zip(list(LIMITS)[1:], [mean, *off], strict=True)}


def beyond(errors: dict[str, float]) -> list[str]:
    """The names of the errors beyond their limits."""
    return [name for name, multiple in errors.items() if not multiple <= 1]


def _multiple(error: float, name: str) -> float:
    return math.inf if math.isnan(error) else error / LIMITS[name]


def _line(name: str, rows: list[CalibrationRow]) -> str:
    counts = [
        (sum(row.right for row in rows if row.status == status), sum(row.status == status for row in rows))
        for status in STATUSES
    ]
    cells = [f"{right}/{total - right}" for right, total in counts[:3]]
    seconds = sum(row.cpu_seconds for row in rows)
    return f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells) + f"{counts[3][1]:>8}{seconds:>9.0f}"
