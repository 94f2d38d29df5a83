"""What is judged, in one record: draws with their weights, a verdict, and the flow that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...arguments import whole
from ...flows.distribution import Flow
from ...running import seeded
from ...targets.target import Target, is_model
from ..estimate.psis import resampling_weights
from ..estimate.quantities import resample
from ..locate.gaussian import Gaussians
from .verdict import Judgement


@dataclass(frozen=True)
class Settings:
    """How a fit was made, as JSON can hold it.

    seed; flow: the name that was asked for; recipe: the name by which the flow can be rebuilt; is_model: whether draws
    have names; centring: degrees by site; options: those of ``fit``; corrections: how each was made, by method.
    """

    seed: int | None = None
    flow: str | None = None
    recipe: str | None = None
    is_model: bool = False
    centring: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    corrections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def corrected(self, method: str, how: Mapping[str, Any]) -> Settings:
        """The same with one more correction, the last one."""
        others = {name: value for name, value in self.corrections.items() if name != method}
        return replace(self, corrections={**others, method: dict(how)})


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file keeps of a target, for use without it: named draws, each (n, ...), observed data by name, and names
    of the dimensions that lie in plates."""

    draws: Mapping[str, Tensor]
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    dims: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.draws.values())))


@dataclass(kw_only=True, eq=False)
class Fitted(Judgement):
    """An approximation to a target, judged.

    draws: (S, dim), the draws to use, equally weighted, in the unconstrained coordinates of ``target`` (its own, where
    sites of a model were recentred: ``target.constrain`` gives values): those of the defensive proposal, resampled by
    their weights, or of a correction. flow_draws: (S, dim) of the flow q as they are, with log_weights (S,) = log p −
    log q.
    verdict: status "reliable", "corrected" or "unreliable", with reasons.
    khat: mean k̂ of q's weights over repeats of S draws; khat_interval: 90 % interval of that mean.
    ess: effective sample size of ``flow_draws``, a count out of S.
    elbo: the evidence lower bound of q. log_evidence, log_evidence_se: log ∫p, from the defensive proposal, and its
    Monte-Carlo error together with half of what unseen tails may carry; under improper priors it is a log normaliser.
    proposal: draws of the defensive proposal with their weights, from which :meth:`sample` resamples.
    flow, target: as fitted; None where a file was loaded without them.
    modes: Gaussians at the optima that locating saw. flow_description, trace, settings, timing: how it was made.
    rehearsal: what :meth:`Posterior.rehearse` found.
    """

    flow: Flow | None
    target: Target | None
    modes: Gaussians | None = None
    flow_description: str = ""
    notes: tuple[str, ...] = ()
    trace: list[float] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    timing: dict[str, float] = field(default_factory=dict)
    stored: Stored | None = None
    rehearsal: Any = None

    @property
    def dim(self) -> int:
        return self.flow_draws.shape[1]

    @property
    def draws(self) -> Tensor:
        with seeded(0):
            return self.proposal.x[resample(resampling_weights(self.proposal.log_w), len(self.flow_draws))]

    def sample(self, num_draws: int, weighted: bool = True, seed: int | None = None) -> dict[str, Tensor] | Tensor:
        """Draws of a model, a dict of named constrained tensors (num_draws, ...), or of a density, (num_draws, dim).

        weighted: resample the defensive proposal's draws by their (below k̂ = 1 Pareto-smoothed) importance weights:
        draws of the target, as far as the verdict goes; single draws repeat where num_draws or a weight is large. If
        False, fresh draws of the flow q.
        seed: None draws from torch's global generator.

        Raises ValueError if num_draws is not positive, or exceeds the stored draws of a posterior that was loaded
        without a target.
        """
        whole("num_draws", num_draws)
        with seeded(seed):
            if self.target is None:
                return self._sample_stored(num_draws, weighted)
            if weighted:
                x = self.proposal.x[resample(resampling_weights(self.proposal.log_w), num_draws)]
            else:
                with torch.no_grad():
                    x = self._flow("sample")().rsample_and_log_prob((num_draws,))[0]
            values = self.target.constrain(x)
        return values if is_model(self.target) else x

    def _sample_stored(self, num_draws: int, weighted: bool) -> dict[str, Tensor] | Tensor:
        if self.stored is None or not weighted:
            raise ValueError("sample: this posterior has no target; load it with vf.load(path, target=...)")
        size = len(self.stored)
        if num_draws > size:
            raise ValueError(
                f"num_draws: expected at most the {size} stored draws, got {num_draws}; load with target= for more"
            )
        index = torch.randperm(size)[:num_draws]
        chosen = {name: value[index] for name, value in self.stored.draws.items()}
        return chosen if self.settings.is_model else chosen["x"]

    def log_prob(self, x: Tensor) -> Tensor:
        """log q of x (..., dim) -> (...) by the fitted flow, x in the coordinates of ``target``, as ``draws`` are."""
        flow = self._flow("log_prob")
        return flow().log_prob(x.to(dtype=flow.dtype, device=flow.device)).to(x.dtype)

    def _flow(self, caller: str) -> Flow:
        if self.flow is None:
            raise ValueError(f"{caller}: the flow could not be rebuilt; load it with vf.load(path, flow=...)")
        return self.flow

    def describe(self) -> str:
        """The verdict in words, with its numbers, a few lines of text."""
        low, high = self.khat_interval
        lines = [
            f"verdict: {self.verdict.status}",
            *(f"  - {reason}" for reason in self.verdict.reasons),
            f"k̂ {self.khat:.2f} ({low:.2f} to {high:.2f}), ESS {self.ess:.0f} of {len(self.flow_draws)} draws of q",
            f"{self.evidence_name} {self.evidence_text}, ELBO {fixed(self.elbo)}",
        ]
        lines += [f"flow: {self.flow_description}"] if self.flow_description else []
        return "\n".join([*lines, *self.notes, *(self.rehearsal.sentences if self.rehearsal else ())])

    @property
    def evidence_name(self) -> str:
        """What ∫p is: the evidence of a model, the normaliser of a density."""
        return "log evidence" if self.settings.is_model else "log normaliser"

    @property
    def evidence_text(self) -> str:
        """log_evidence ± its standard error, for people."""
        return f"{fixed(self.log_evidence)} ± {fixed(self.log_evidence_se)}"

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.verdict.status}, dim {self.dim}, k̂ {self.khat:.2f}, "
            f"ESS {self.ess:.0f}/{len(self.flow_draws)}, "
            f"{self.evidence_name} {self.evidence_text})"
        )


def fixed(value: float) -> str:
    """Three decimals, or, for what an improper target may give, an exponent."""
    return f"{value:.3f}" if abs(value) < 1e9 else f"{value:.3e}"
