"""The result of a fit: draws with their weights, a verdict, and the flow that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import whole
from ..flows.distribution import Flow
from ..targets.target import Target
from .gaussian import Gaussians
from .judge import Judgement
from .psis import resampling_weights
from .quantities import resample

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from .rehearse import Rehearsal


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under its own seed and leave torch's global generators as they were; None: draw from the global state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass(kw_only=True)
class Posterior(Judgement):
    """An approximation to a target, judged.

    draws: (S, dim) draws of the flow q in the unconstrained coordinates of ``target`` (its own, where sites of a model
    were recentred: ``target.constrain`` gives values), aligned with log_weights (S,) = log p − log q.
    verdict: status "reliable", "corrected" or "unreliable", with reasons.
    khat: mean k̂ of q's weights over repeats of S draws; khat_interval: 90 % interval of that mean.
    ess: effective sample size of ``draws``, a count out of S.
    elbo: the evidence lower bound of q. log_evidence, log_evidence_se: log ∫p, from the defensive proposal, and its
    Monte-Carlo error together with half of what unseen tails may carry; under improper priors it is a log normaliser.
    proposal: draws of the defensive proposal with their weights, from which :meth:`sample` resamples.
    flow, target: as fitted; None where a file was loaded without them.
    modes: Gaussians at the optima that locating saw. flow_description, trace, settings, timing: how it was made.
    rehearsal: what :meth:`rehearse` found.
    """

    flow: Flow | None
    target: Target | None
    modes: Gaussians | None = None
    flow_description: str = ""
    notes: tuple[str, ...] = ()
    trace: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    stored: dict[str, Tensor] | None = None
    rehearsal: Rehearsal | None = None

    @property
    def dim(self) -> int:
        return self.draws.shape[1]

    def sample(self, n: int, weighted: bool = True, seed: int | None = None) -> dict[str, Tensor] | Tensor:
        """n draws: a dict of named constrained tensors (n, ...) for a model, a tensor (n, dim) for a density.

        weighted: resample the defensive proposal's draws by their (below k̂ = 1 Pareto-smoothed) importance weights:
        draws of the target, as far as the verdict goes; single draws repeat where n or a weight is large. If False,
        fresh draws of the flow q.
        seed: None draws from torch's global generator.

        Raises ValueError if n is not positive, or if the posterior was loaded without a target and n exceeds the
        stored draws.
        """
        whole("n", n)
        with seeded(seed):
            if self.target is None:
                return self._sample_stored(n, weighted)
            if weighted:
                x = self.proposal.x[resample(resampling_weights(self.proposal.log_w), n)]
            else:
                with torch.no_grad():
                    x = self._flow("sample")().rsample_and_log_prob((n,))[0]
            values = self.target.constrain(x)
        return values if is_model(self.target) else x

    def _sample_stored(self, n: int, weighted: bool) -> dict[str, Tensor] | Tensor:
        if self.stored is None or not weighted:
            raise ValueError("sample: this posterior has no target; load it with vf.load(path, target=...)")
        size = len(next(iter(self.stored.values())))
        if n > size:
            raise ValueError(f"n: expected at most the {size} stored draws, got {n}; load with target= for more")
        index = torch.randperm(size)[:n]
        chosen = {name: value[index] for name, value in self.stored.items()}
        return chosen if self.settings.get("model") else chosen["x"]

    def log_prob(self, x: Tensor) -> Tensor:
        """log q of x (..., dim) -> (...) by the fitted flow, x in the coordinates of ``target``, as ``draws`` are."""
        flow = self._flow("log_prob")
        return flow().log_prob(x.to(dtype=flow.dtype, device=flow.device)).to(x.dtype)

    def _flow(self, caller: str) -> Flow:
        if self.flow is None:
            raise ValueError(f"{caller}: the flow could not be rebuilt; load it with vf.load(path, flow=...)")
        return self.flow

    def summary(self, var_names: str | Sequence[str] | None = None, round_to: int | None = None) -> DataFrame:
        """A table of the weighted draws, a row for each quantity ("mu", "theta[0]").

        Columns: mean, sd, 5 %, 50 %, 95 % points, standard errors of mean and sd (mcse_mean, mcse_sd), the effective
        sample size ess = (sd/mcse_mean)², and khat, the tail shape of the terms that make the mean and the variance.
        var_names: quantities to keep ("theta", "theta[0]") or leave out ("~theta"). round_to: decimals, None for all.
        """
        from ..report import summary

        return summary(self, var_names, round_to)

    def to_arviz(
        self,
        n: int | None = None,
        weighted: bool = True,
        seed: int | None = 0,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> InferenceData:
        """The posterior as ArviZ's InferenceData: equally weighted draws (resampled, as in :meth:`sample`), for which
        every function of ArviZ is right; verdict and evidence in its attrs.

        n: draws, 4000 unless said. weighted: False gives the draws of q, with their log-weights in sample_stats.
        dims, coords: as in ``arviz.from_dict``. More in :func:`vi_flows.report.to_arviz`.
        """
        from ..report import to_arviz

        return to_arviz(self, n, weighted, seed, dims, coords)

    def plot(
        self, kind: str = "overview", path: str | Path | None = None, *, var_names: str | Sequence[str] | None = None
    ) -> Figure:
        """A picture of the fit, as a matplotlib Figure, written to ``path`` if there is one.

        kind: "overview", or one part of it: "trace", "weights", "marginals", "pairs", "density" (for two coordinates).
        var_names: quantities to draw ("theta", "theta[0]") or to leave out ("~theta"). More in
        :func:`vi_flows.report.plot`.
        """
        from ..report import plot

        return plot(self, kind, path, var_names=var_names)

    def report(self, path: str | Path) -> Path:
        """Write the fit as one HTML page that needs nothing beside it, atomically; returns its path.

        Verdict and checks, summary, pictures, modes, data, and how to make it again: to read, print or send.
        Raises ValueError, in one line, for a path that does not end in .html or cannot be written.
        """
        from ..report.html import write

        return write(self, path)

    def describe(self) -> str:
        """The verdict in words, with its numbers, a few lines of text."""
        low, high = self.khat_interval
        lines = [
            f"verdict: {self.verdict.status}",
            *(f"  - {reason}" for reason in self.verdict.reasons),
            f"k̂ {self.khat:.2f} ({low:.2f} to {high:.2f}), ESS {self.ess:.0f} of {len(self.draws)} draws of q",
            f"{self.evidence_name} {self.evidence_text}, ELBO {fixed(self.elbo)}",
        ]
        lines += [f"flow: {self.flow_description}"] if self.flow_description else []
        return "\n".join([*lines, *self.notes, *(self.rehearsal.sentences if self.rehearsal else ())])

    @property
    def evidence_name(self) -> str:
        """What ∫p is: the evidence of a model, the normaliser of a density."""
        return "log evidence" if self.settings.get("model") else "log normaliser"

    @property
    def evidence_text(self) -> str:
        """log_evidence ± its standard error, for people."""
        return f"{fixed(self.log_evidence)} ± {fixed(self.log_evidence_se)}"

    def __repr__(self) -> str:
        return (
            f"Posterior({self.verdict.status}, dim {self.dim}, k̂ {self.khat:.2f}, "
            f"ESS {self.ess:.0f}/{len(self.draws)}, "
            f"{self.evidence_name} {self.evidence_text})"
        )

    def resample(self, n: int = 10_000, seed: int | None = 0) -> Posterior:
        """The simplest correction, made lasting: n equally weighted draws, resampled from the defensive proposal by its
        importance weights, Pareto-smoothed below k̂ = 1 (Vehtari et al. 2024), as :meth:`sample` does at each call.

        Returns a Posterior of the same flow and evidence, whose ``proposal`` holds these draws; "corrected" where this
        one could be claimed, else "unreliable". Raises ValueError for n < 100.
        """
        from .correct import resample

        return resample(self, n, seed)

    def anneal(
        self,
        particles: int = 5000,
        replicates: int = 8,
        seed: int | None = 0,
        progress: bool = False,
        threads: int | None = 1,
    ) -> Posterior:
        """A correction where weights alone are not enough: a posterior whose weighted draws are annealed to the target.

        Sequential Monte Carlo: draws of the defensive proposal m are weighted, resampled and moved by Hamiltonian Monte
        Carlo through m^(1−b) p^b, from b = 0 to 1 (Del Moral, Doucet & Jasra 2006; Neal 2001), in the flow's latent
        space, where p is nearly m. A pilot run chooses the temperatures and kernels, and ``replicates`` runs keep to
        them: log_evidence is the log of the mean of their unbiased estimates Ẑ, with its standard error over the runs.
        Where draws of m do not reach down a neck, the last temperature moves scales together with what they spread, and
        Ẑ is a bridge from m to the draws (Meng & Wong 1996), unbiased only as these come to the neck's end.

        particles: in each run. seed: the result depends on it alone; None: drawn from the global generator. progress:
        show a progress bar. threads: of torch, meanwhile.

        Returns a Posterior with the same flow, whose ``proposal`` holds the runs' draws at b = 1, each with the weight
        Ẑ of its run; ``settings["anneal"]`` says what was done. Its verdict is "corrected" or "unreliable", by the
        precision of every quantity and of log Ẑ over the runs, by agreement with the importance weights of m (or, where
        scales are moved, by what the last moves still change), and by the tails and evenness of each step's weights. A
        mode in which m has no draws is not found.

        Raises ValueError for arguments out of range, without target or flow, and if m does not reach the target.
        """
        from .correct import anneal

        return anneal(self, particles, replicates, seed, progress, threads)

    def mcmc(
        self,
        method: str = "hmc",
        chains: int = 8,
        draws: int | None = None,
        warmup: int | None = None,
        seed: int | None = 0,
        progress: bool = False,
        threads: int | None = 1,
    ) -> Posterior:
        """A correction by Markov chains: a posterior whose weighted draws are their states, equally weighted.

        method: "hmc" or "nuts", chains by Pyro's kernels in the flow's latent space, where the flow has straightened p
        (NeuTra: Hoffman et al. 2019), from draws of this posterior; "imh" or "isir", independence Metropolis or
        iterated sampling importance resampling (Andrieu, Lee & Vihola 2018), whose proposals are the weighted draws at
        hand, begun where their total variation distance is bounded by .01 (Biswas, Jacob & Vanetti 2019).
        chains: at least 2; those of "nuts" and "hmc" are evaluated together, so that eight cost little more than one.
        draws, warmup: of each of these, 750 after 300 unless said. seed: the result depends on it alone; None: drawn
        from the global generator. progress: show a progress bar. threads: of torch, meanwhile.

        Returns a Posterior with the same flow, whose ``proposal`` holds the states; ``settings["mcmc"]`` says what was
        done. Its verdict is "corrected" or "unreliable", by R̂, ESS, precision and tails of every quantity, by
        divergences and energies, or by the bound and the tails of the weights, and by agreement with the importance
        weights, whose log_evidence it keeps. Chains that cannot move between modes show in R̂. Scales are moved, too, as
        in :meth:`anneal`, where draws do not reach down a neck; log_evidence is then a bridge to the states.

        Raises ValueError for arguments out of range and without target or flow.
        """
        from .mcmc import mcmc

        return mcmc(self, method, chains, draws, warmup, seed, progress, threads)

    def rehearse(self, k: int = 20, seed: int = 0, **options: Any) -> Rehearsal:
        """Check fits of this model by k data sets drawn from the fit, each refitted together with the real data.

        What it says is in ``sentences`` and ``table()`` of the result, which is kept as ``rehearsal`` too: a bound on
        false claims, and how often intervals hold the values that made the data. More, and the options, in
        :func:`vi_flows.inference.rehearse.rehearse`. Raises ValueError for a density, and for a model whose data cannot
        be simulated.
        """
        from .rehearse import rehearse

        self.rehearsal = rehearse(self, k, seed, **options)
        return self.rehearsal

    def save(self, path: str | Path) -> Path:
        """Write everything but the target to one safetensors file with a JSON header, atomically; returns its path."""
        from .checkpoint import save

        return save(self, path)


def fixed(value: float) -> str:
    """Three decimals, or, for what an improper target may give, an exponent."""
    return f"{value:.3f}" if abs(value) < 1e9 else f"{value:.3e}"


def is_model(target: Target) -> bool:
    """Whether a target's points have names of their own (a Pyro model), so that draws come as a dict."""
    return getattr(target, "names", None) is not None
