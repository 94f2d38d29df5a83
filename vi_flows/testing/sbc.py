"""simulation_based_calibration: are posteriors of a model right on average over data that the model makes itself?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..arguments import whole
from ..fitting.fit import fit as fit_by_default
from ..fitting.posterior import Posterior
from ..inference.rehearse.refits import DATA_SEED, Quantities, RankCheck, Refit, Values, collect, measured, point
from ..running import seeded
from ..targets import PyroModel, resolve_target
from ..targets.pyro_simulate import check_prior, conditioned_on_data, simulate, with_data

Fit = Callable[[PyroModel, int], Posterior]


@dataclass(frozen=True)
class SimulationBasedCalibration(RankCheck):
    """The fits of n simulated data sets, and the ranks of the parameters that made them.

    conditioned: observed sites whose distributions read data as constants (an autoregression around its argument): each
    entry was simulated as it follows from the real ones.
    """

    conditioned: tuple[str, ...] = ()


def simulation_based_calibration(
    model: PyroModel | Callable[..., Any],
    n: int,
    *args: Any,
    seed: int = 0,
    fit: Fit | None = None,
    quantities: Quantities | None = None,
    kept: Iterable[Refit] = (),
    report: Callable[[Refit], None] | None = None,
    **options: Any,
) -> SimulationBasedCalibration:
    r"""Fit n data sets simulated with parameters from the prior, and rank these among the posterior draws.

    .. math:: \theta^* \sim p(\theta), \quad y^* \sim p(y \mid \theta^*), \quad
        u = P_q(\theta < \theta^*) \sim U(0, 1) \text{ if } q = p(\theta \mid y^*)

    (Talts, Betancourt, Simpson, Vehtari & Gelman 2018.) The verdict sees y* only, so that ranks are uniform among the
    claimed fits as well, if claims are right. Uniform ranks are necessary, not sufficient: the log density, ranked with
    the parameters, shows also what forgets its data (Modrák et al. 2023).

    Parameters
    ----------
    model, args: a Pyro model and its arguments, or a PyroModel. The data in them give only the shapes: values at
        observed sites are replaced. What else the model reads stays, data as well; see ``conditioned``.
    n, seed: data sets, of seeds seed .. seed + n − 1, on which the result depends alone.
    fit: (target, seed) -> Posterior, whatever has ``sample(n)`` and ``verdict``. None: ``vf.fit`` with ``options``,
        its defaults if there are none.
    quantities: values, {"mu": (N,), ...} with deterministic sites, -> what is ranked, each (N, ...). None: all latent
        scalars and the log density.
    kept: rows of an earlier run, which are not fitted again. report: is called with every row.

    Raises ValueError for n < 1, for improper priors, and for data that cannot be simulated.
    """
    whole("n", n, remedy="the number of data sets to fit")
    target = resolve_target(model, *args)
    if not isinstance(target, PyroModel):
        raise ValueError("model: expected a Pyro model, got a density; only a model has a prior and simulates data")
    with seeded(seed + DATA_SEED):
        first = point(target.constrain(target.prior(1)))
        simulate(target, first)
        check_prior(target, first)
        conditioned = tuple(conditioned_on_data(target, first))

    def simulated() -> tuple[Values, PyroModel]:
        truth = target.constrain(target.prior(1))
        return truth, with_data(target, simulate(target, point(truth)))

    chosen = fit or (lambda target, seed: fit_by_default(target, seed=seed, progress=False, **options))
    rows = collect(n, seed, lambda s: measured(s, simulated, chosen, quantities), kept, report)
    return SimulationBasedCalibration(rows, conditioned)
