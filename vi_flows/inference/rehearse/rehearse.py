"""rehearse: fits of data like those that were fitted, whose answers are known, before the fit is relied on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...arguments import whole
from ...progress import Progress
from ...running import seeded, threads
from ...targets.pyro_model import PyroModel
from ...targets.pyro_simulate import conditioned_on_data, simulate, with_replicate
from ...targets.target import Target
from ..candidates import fitted, prepare
from ..judge.fitted import Fitted
from ..options import Options
from .refits import CLAIMED, COVERAGE_LEVELS, DATA_SEED, Quantities, RankCheck, Refit, Values, collect, measured, point

# of training in a refit, which begins at the fit to the real data: more cost k times, fewer leave refits worse than the
# fit that they stand for. Chosen, not measured
REFIT_STEPS = 200
SHOWN_DEPARTURES = 5  # in the sentences, the table has all: for reading only


@dataclass(frozen=True)
class Rehearsal(RankCheck):
    """k refits of rehearsed data, and what they say of fits of this model; see :func:`rehearse`.

    rows: one for each refit. status: of the fit that was rehearsed. conditioned: observed sites whose distributions
    read data as constants, so that each entry is simulated as it follows from the real ones.
    """

    status: str
    conditioned: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """What can be said after k refits, and what cannot."""
        claims, failed = len(self.claims), len(self.rows) - len(self.fits)
        lines = [
            f"rehearsal: {len(self.rows)} data sets drawn from the fit, each refitted with the real data; {claims} "
            f"refits were claimed, {len(self.fits) - claims} called unreliable, {failed} failed."
        ]
        if self.status not in CLAIMED:
            lines.append("the fit that was rehearsed is itself unreliable: the data are like what it found.")
        lines += self._of_claims() if claims else ["nothing was claimed, so that nothing is known of claims."]
        lines += [
            f"site '{name}' reads data as constants: steps are simulated, no series." for name in self.conditioned
        ]
        return [*lines, "what the fit and its refits miss alike, such as an unseen mode, does not show."]

    def _of_claims(self) -> list[str]:
        false, departures = self.false_claims, self.departures()
        covered = [(level, *self.coverage(level)) for level in COVERAGE_LEVELS]
        shares = [f"central {level:.0%} in {mean:.0%}" + f" ± {se:.0%}" * (se == se) for level, mean, se in covered]
        return [
            f"{false.count} of {false.total} claims exclude the values that made their data (joint 99 % intervals of "
            f"{len(self.quantities())} quantities; 1 % would by chance): false claims that gross are at most "
            f"{false.upper:.1%} (95 %).",
            f"claimed intervals hold these values, on average over quantities: {', '.join(shares)}.",
            *(f"departs from what is right: {departure}." for departure in departures[:SHOWN_DEPARTURES]),
            *(
                [f"and {len(departures) - SHOWN_DEPARTURES} more departures."]
                if len(departures) > SHOWN_DEPARTURES
                else []
            ),
            *([] if departures else [f"nothing departs beyond chance; {self.unseen}"]),
        ]

    @property
    def unseen(self) -> str:
        """How large an error common to all claims would probably have been seen."""
        return f"{len(self.claims)} claims would show an offset common to all of them from {self.resolution:.1f} sd on."

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def rehearse(
    posterior: Fitted,
    k: int,
    seed: int = 0,
    *,
    quantities: Quantities | None = None,
    kept: Iterable[Refit] = (),
    report: Callable[[Refit], None] | None = None,
    **options: Any,
) -> Rehearsal:
    r"""Check fits of this model, near these data, by k data sets whose parameters are known.

    .. math:: \theta^* \sim p(\theta \mid y), \quad y^* \sim p(y \mid \theta^*), \quad
        q \approx p(\theta \mid y, y^*) \propto p(\theta)\, p(y \mid \theta)\, p(y^* \mid \theta)

    θ* is one draw of p(θ|y, y*), so that its ranks among draws of a right q are uniform (posterior simulation-based
    calibration: Säilynoja, Schmitt, Bürkner & Vehtari 2025). p(θ|y*) alone would not do: θ* is not from the prior.
    A claim depends on y and y* only, so that this holds among the claimed refits too. Whether a single refit is wrong
    cannot be told, for the truth of its posterior is not known; what k refits can show are claims that exclude θ*, and
    errors that many refits share.

    Parameters
    ----------
    posterior: of a Pyro model whose data can be simulated; θ* is a weighted draw of it.
    k, seed: refits, of seeds seed .. seed + k − 1; the result depends on these alone.
    quantities: values, {"mu": (N,), ...} with deterministic sites, -> what is ranked, each (N, ...). None: all latent
        scalars and the log density.
    kept: rows of an earlier run, which are not fitted again. report: is called with every row.
    options: of ``fit``. A refit starts from the flow fitted to y (which knows nothing of θ*), seeks its modes afresh,
        takes at most 200 steps and is judged as any fit is.

    Raises ValueError for k < 1, a density, or a model whose data cannot be simulated.
    """
    check_rehearsal(posterior.target, k)
    model = posterior.target
    options = ({} if "init" in options or "flow" in options else start(posterior)) | options
    with seeded(seed + DATA_SEED):
        conditioned = tuple(conditioned_on_data(model, point(posterior.sample(1))))

    def simulated() -> tuple[Values, PyroModel]:
        truth = posterior.sample(1)
        return truth, with_replicate(model, simulate(model, point(truth)))

    chosen = options.pop("flow", "auto")
    options = Options(**options)

    def refit(target: PyroModel, seed: int) -> Fitted:
        with seeded(seed), threads(options.threads), Progress(False) as bar:
            return fitted(prepare(target, options), chosen, options, seed, bar)

    rows = collect(k, seed, lambda s: measured(s, simulated, refit, quantities), kept, report)
    return Rehearsal(rows, posterior.verdict.status, conditioned)


def check_rehearsal(target: Target, k: int) -> None:
    """Raise ValueError, in one line, for what :func:`rehearse` refuses: before a fit, rather than after it."""
    whole("rehearse", k, remedy="the number of data sets to refit")
    if not isinstance(target, PyroModel):
        raise ValueError(
            "rehearse: expected the posterior of a Pyro model, got one of a density or without its target; "
            "only a model can simulate data"
        )
    with seeded(0):
        simulate(target, point(target.constrain(torch.zeros(1, target.dim, dtype=target.dtype, device=target.device))))


def start(posterior: Fitted) -> dict[str, Any]:
    """Options of a warm start from the posterior's flow; none where it cannot be trained."""
    trainable = posterior.flow is not None and any(True for _ in posterior.flow.parameters())
    return {"init": posterior.flow, "steps": REFIT_STEPS} if trainable else {}
