"""The ArviZ bridge: a posterior as InferenceData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..inference.estimate.psis import import_arviz
from ..inference.judge.fitted import Fitted, Stored
from ..targets.target import is_model
from ..version import __version__
from .draws import NamedDraws, constraint, flow_draws, weighted_draws

if TYPE_CHECKING:
    from arviz import InferenceData

ARVIZ_DRAWS = 4000
DRAWS_MEANINGS = {
    True: "equally weighted: the defensive proposal's draws, resampled by their importance weights",
    False: "draws of the flow q as they are; their importance weights are in sample_stats",
}

CORRECTED = {
    "anneal": "equally weighted: annealed draws, resampled by the weights of their runs",
    "mcmc": "equally weighted: states of Markov chains",
    "resample": "equally weighted: resampled from the defensive proposal by importance weights",
}


def to_arviz(
    posterior: Fitted,
    num_draws: int | None,
    weighted: bool,
    seed: int | None,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> InferenceData:
    """The posterior as ArviZ's InferenceData, in one chain.

    ArviZ takes all draws of a posterior group as equally weighted. So the group holds draws that are: those of the
    defensive proposal, resampled by their weights, as ``posterior.sample(num_draws, seed=seed)`` gives them; every
    function of ArviZ is right on them as far as the verdict goes. They are independent but for copies
    (``proposal_draw`` tells which), so ArviZ's own ESS and MCSE, made for chains, do not see the weights: those of
    ``posterior.summary()`` do.

    Groups
    ------
    posterior: named, constrained values; "x" for a density.
    sample_stats: of the draw in the same place, lp = log p(x), log_q = the log density that it was drawn from, and
        log_weight = lp − log_q. With weighted=True that is the proposal's, and the resampling has used the weights up:
        do not weight again. With weighted=False they are what the draws of q need. Absent for a model that was loaded
        without its target; lp and log_q also where the flow could not be rebuilt or inverted.
    unconstrained_posterior: x, by coordinate, of a model.
    observed_data: a model's data.
    attrs, of the whole and of the group posterior: verdict, reasons, khat, khat_interval, ess (all of q's weights),
        elbo, log_evidence, log_evidence_se, seed, flow, draws (which these are), versions.

    Parameters
    ----------
    num_draws: 4000 unless said, or with weighted=False all that are kept.
    weighted: False gives the draws of q with their log-weights.
    seed: of the resampling; None draws from torch's global generator.
    dims, coords: as in ``arviz.from_dict``. Where dims does not name them, a model's plates name the dimensions.

    Raises ValueError for num_draws out of range, for a site named "chain" or "draw", and for weighted=False of a model
    that was loaded without its target.
    """
    if not weighted:
        drawn = flow_draws(posterior, num_draws)
    else:
        stored = len(posterior.stored) if posterior.stored is not None else ARVIZ_DRAWS
        most = ARVIZ_DRAWS if constraint(posterior) is not None else min(ARVIZ_DRAWS, stored)
        drawn = weighted_draws(posterior, most if num_draws is None else num_draws, seed)
    target, stored = posterior.target, posterior.stored or Stored({})
    observed = _arrays(stored.observed if target is None else target.observed)
    named = _arrays(drawn.values)
    if taken := {"chain", "draw"} & {*named, *observed}:
        raise ValueError(
            f"to_arviz: expected other names than those of ArviZ's axes, got a site {min(taken)!r}; rename it"
        )
    groups = {"posterior": _one_chain(named), "sample_stats": _one_chain(_stats(drawn, weighted)) or None}
    attrs = _attrs(posterior, weighted, seed)
    shapes = {name: value.shape for name, value in observed.items()}
    shapes |= {name: value.shape[1:] for name, value in named.items()}
    plates = stored.dims if target is None else target.plate_dims(shapes)
    data = import_arviz().from_dict(  # 1.x: from_dict({"posterior": ...}) -> DataTree
        **groups,
        observed_data=observed or None,
        dims={**plates, **(dims or {})},
        coords=dict(coords or {}),
        attrs=dict(attrs),
        posterior_attrs=attrs,
    )
    if drawn.x is not None and target is not None and is_model(target):
        data.add_groups(unconstrained_posterior=_unconstrained(drawn.x, target.coordinate_names()))
    return data


def _stats(drawn: NamedDraws, weighted: bool) -> dict[str, np.ndarray]:
    parts = {"lp": drawn.log_p, "log_q": drawn.log_q, "log_weight": drawn.log_w}
    parts["proposal_draw" if weighted else "flow_draw"] = drawn.index
    return _arrays({name: value for name, value in parts.items() if value is not None})


def _unconstrained(x: Tensor, names: list[str]) -> Any:
    return import_arviz().dict_to_dataset(
        {"x": x.detach().cpu().numpy()[None]}, dims={"x": ["coordinate"]}, coords={"coordinate": names}
    )


def _arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in values.items()}


def _one_chain(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value[None] for name, value in values.items()}


def _attrs(posterior: Fitted, weighted: bool, seed: int | None) -> dict[str, Any]:
    """What the draws cannot tell, in the types that a netCDF file can hold: text, floats and lists of these."""
    numbers = ("khat", "ess", "elbo", "log_evidence", "log_evidence_se")
    corrected = [words for name, words in CORRECTED.items() if name in posterior.settings.corrections]
    attrs = {
        "verdict": posterior.verdict.status,
        "reasons": list(posterior.verdict.reasons),
        "khat_interval": [float(v) for v in posterior.khat_interval],
        **{name: float(getattr(posterior, name)) for name in numbers},
        "num_draws_of_q": len(posterior.flow_draws),
        "evidence": posterior.evidence_name,
        "flow": posterior.flow_description,
        "notes": "\n".join(posterior.notes),
        "draws": corrected[-1] if weighted and corrected else DRAWS_MEANINGS[weighted],
        "inference_library": "vi_flows",
        "inference_library_version": __version__,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
    }
    seeds = {"seed": posterior.settings.seed, "resampling_seed": seed if weighted else None}
    return attrs | {name: value for name, value in seeds.items() if value is not None}
