"""The summary table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inference.estimate.psis import khat
from ..inference.estimate.quantities import Estimates, carrying, estimate, flatten, vary
from ..inference.estimate.weights import effective_sample_size
from ..inference.judge.fitted import Fitted
from .draws import constraint, select

if TYPE_CHECKING:
    from pandas import DataFrame


def summary(posterior: Fitted, var_names: str | Sequence[str] | None = None, round_to: int | None = None) -> DataFrame:
    """A table of the weighted draws of the defensive proposal, one row per quantity, named as ArviZ names them.

    Columns: mean, sd, 5%, 50%, 95%; mcse_mean, mcse_sd, the standard errors of the first two; ess = (sd/mcse_mean)²,
    how many independent draws would give as precise a mean; khat, the larger k̂ of w·|θ − mean| and w·(θ − mean)², below
    0.7 where mean and sd can be relied on (NaN without the weights of a model loaded without its target). For constants
    ess and khat are NaN.

    Parameters
    ----------
    var_names: variables or single quantities to keep ("theta", "theta[0]"), or to leave out ("~theta").
    round_to: decimals; None does not round.

    Raises
    ------
    ValueError for unknown var_names, or a model loaded without target and stored draws.
    """
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int)):
        raise ValueError(f"round_to: expected a number of decimals or None, got {round_to!r}")
    from pandas import DataFrame  # pandas comes with ArviZ; importing it takes half a second

    names, theta, log_w = _quantities(posterior)
    chosen = select(names, var_names)
    theta = theta[:, chosen]
    values = estimate(theta, log_w)
    tails = _tails(theta, values, log_w)
    more = 1.0
    if constraint(posterior) is None:  # stored draws were resampled: some are copies of one another
        more = math.sqrt(1 + len(theta) / effective_sample_size(posterior.proposal.log_w.double()))
        tails = torch.full_like(tails, math.nan)
    low, middle, high = values.quantiles
    errors = {"mcse_mean": values.mean_se * more, "mcse_sd": values.sd * values.log_sd_se * more}
    ess = (values.sd / errors["mcse_mean"]) ** 2
    constant = torch.ones(len(chosen), dtype=torch.bool, device=theta.device)
    constant[vary(theta[carrying(log_w)])] = False
    ess[constant] = math.nan
    columns = {"mean": values.mean, "sd": values.sd, "5%": low, "50%": middle, "95%": high, **errors}
    columns |= {"ess": ess, "khat": tails}
    table = DataFrame(
        {name: column.cpu().numpy() for name, column in columns.items()}, index=[names[i] for i in chosen]
    )
    return table if round_to is None else table.round(round_to)


def _quantities(posterior: Fitted) -> tuple[list[str], Tensor, Tensor]:
    """Names, theta (S, Q) and log_w (S,) of the proposal's draws; of the stored ones, of equal weight, where a model
    came without its target.
    """
    constrain = constraint(posterior)
    if constrain is not None:
        return *flatten(constrain(posterior.proposal.x)), posterior.proposal.log_w.double()
    if posterior.stored is None:
        raise ValueError("summary: this posterior has no target; load it with vf.load(path, target=...)")
    names, theta = flatten(posterior.stored.draws)
    return names, theta, torch.zeros(len(theta), dtype=theta.dtype)


def _tails(theta: Tensor, values: Estimates, log_w: Tensor) -> Tensor:
    """k̂ (Q,) of the terms whose sums are each quantity's mean and variance; NaN where they do not vary."""
    alive = carrying(log_w)
    log_h = (theta[alive] - values.mean).abs().log()
    worst = [max(khat(log_w[alive] + power * column) for power in (1, 2)) for column in log_h.unbind(-1)]
    out = torch.full((len(worst),), math.nan, dtype=theta.dtype)
    varying = vary(theta[alive]).cpu()
    out[varying] = torch.tensor(worst, dtype=theta.dtype)[varying]
    return out
