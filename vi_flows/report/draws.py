"""Named draws of a posterior, whatever of its target and flow a file has brought back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import whole
from ..flows.distribution import NotConverged
from ..inference.estimate.evaluate import in_blocks
from ..inference.estimate.psis import resampling_weights
from ..inference.estimate.quantities import resample
from ..inference.judge.fitted import Fitted
from ..running import seeded

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class NamedDraws:
    """n draws: values by name, each (n, ...); x (n, dim) unconstrained with log_q, the density they were drawn from,
    log_p and log_w = log_p − log_q (n,), None where a file without target or flow does not tell; index (n,), their
    rows in ``posterior.proposal`` or ``posterior.flow_draws``.
    """

    values: Values
    x: Tensor | None = None
    log_q: Tensor | None = None
    log_p: Tensor | None = None
    log_w: Tensor | None = None
    index: Tensor | None = None


def constraint(posterior: Fitted) -> Callable[[Tensor], Values] | None:
    """x (n, dim) -> named values; None for a model that was loaded without its target."""
    if posterior.target is not None:
        return posterior.target.constrain
    return None if posterior.settings.is_model else lambda x: {"x": x}


def weighted_draws(posterior: Fitted, n: int, seed: int | None) -> NamedDraws:
    """n equally weighted draws of the target, as ``posterior.sample`` makes them: the proposal's, resampled.

    Raises ValueError if that is not positive, or exceeds the stored draws of a model loaded without its target.
    """
    whole("num_draws", n)
    constrain, proposal = constraint(posterior), posterior.proposal
    with seeded(seed):
        if constrain is None:
            values = posterior.sample(n)
            return NamedDraws(values if isinstance(values, dict) else {"x": values})
        index = resample(resampling_weights(proposal.log_w), n)
        x, log_q, log_p = proposal.x[index], proposal.log_q[index], proposal.log_p[index]
        return NamedDraws(constrain(x), x, log_q, log_p, log_p - log_q, index)


def flow_draws(posterior: Fitted, n: int | None = None) -> NamedDraws:
    """The first n (None: all) draws of q with their log-weights, as they are.

    Raises ValueError if that is not between 1 and their number, or for a model that was loaded without its target.
    """
    size = len(posterior.flow_draws)
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= size):
        raise ValueError(f"num_draws: expected between 1 and the {size} draws of q that are kept, got {n!r}")
    constrain = constraint(posterior)
    if constrain is None:
        raise ValueError("weighted: expected True, got False without a target; load it with vf.load(path, target=...)")
    x, log_w = posterior.flow_draws[:n], posterior.log_weights[:n]
    log_q = log_p = None
    if posterior.flow is not None:
        with contextlib.suppress(NotConverged):  # of an inverse by iteration
            log_q = in_blocks(posterior.log_prob, x)
            log_p = log_q + log_w
    return NamedDraws(constrain(x), x, log_q, log_p, log_w, torch.arange(len(x)))


def select(names: Sequence[str], var_names: str | Sequence[str] | None) -> list[int]:
    """Positions of the quantities that var_names keep, in the order of names; None keeps all.

    var_names: variables ("theta"), single entries of them ("theta[0]"), or, with "~" before each, those to leave out.
    Raises ValueError for a name that is none of these, or if nothing is left.
    """
    if var_names is None:
        return list(range(len(names)))
    wanted = [var_names] if isinstance(var_names, str) else var_names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"var_names: expected a name or a list of names, got {var_names!r}")
    bare = {name.removeprefix("~") for name in wanted}
    unknown = sorted(bare - set(names) - {variable(name) for name in names})
    excluding = [name.startswith("~") for name in wanted]
    known = ", ".join(dict.fromkeys(map(variable, names)))
    if unknown:
        raise ValueError(f"var_names: expected names among {known}, got {unknown[0]!r}")
    if any(excluding) and not all(excluding):
        raise ValueError(f"var_names: expected names to keep or, each with ~, to leave out, got both in {wanted}")
    keep = [i for i, name in enumerate(names) if ({name, variable(name)} & bare != set()) != any(excluding)]
    if not keep:
        raise ValueError(f"var_names: expected to keep at least one of {known}, got {wanted}")
    return keep


def variable(name: str) -> str:
    """The variable that a quantity belongs to: "theta" of "theta[0]"."""
    return name.rpartition("[")[0] if name.endswith("]") else name
