"""The result of a fit, and what can be done with it: tables, pictures, corrections, rehearsals, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..flows.distribution import Flow
from ..inference import store
from ..inference.correct.anneal import anneal, resample
from ..inference.correct.chains import mcmc
from ..inference.judge.fitted import Fitted
from ..inference.rehearse.rehearse import Rehearsal, rehearse
from ..targets.target import Target

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Posterior(Fitted):
    """An approximation to a target, judged, and what can be done with it; its fields are those of :class:`Fitted`."""

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
        num_draws: int | None = None,
        weighted: bool = True,
        seed: int | None = 0,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> InferenceData:
        """The posterior as ArviZ's InferenceData: equally weighted draws (resampled, as in :meth:`sample`), for which
        every function of ArviZ is right; verdict and evidence in its attrs.

        num_draws: 4000 unless said. weighted: False gives the draws of q, with their log-weights in sample_stats.
        dims, coords: as in ``arviz.from_dict``. More in :func:`vi_flows.report.to_arviz`.
        """
        from ..report import to_arviz

        return to_arviz(self, num_draws, weighted, seed, dims, coords)

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

    def resample(self, num_draws: int = 10_000, seed: int | None = 0) -> Posterior:
        """The simplest correction, made lasting: equally weighted draws, resampled from the defensive proposal by its
        importance weights, Pareto-smoothed below k̂ = 1 (Vehtari et al. 2024), as :meth:`sample` does at each call.

        Returns a Posterior of the same flow and evidence, whose ``proposal`` holds these draws; "corrected" where this
        one could be claimed, else "unreliable". Raises ValueError for num_draws < 100.
        """
        return resample(self, num_draws, seed)

    def anneal(
        self,
        particles: int = 5000,
        replicates: int = 8,
        seed: int | None = 0,
        progress: bool = True,
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
        Ẑ of its run; ``settings.corrections`` says what was done. Its verdict is "corrected" or "unreliable", by the
        precision of every quantity and of log Ẑ over the runs, by agreement with the importance weights of m (or, where
        scales are moved, by what the last moves still change), and by the tails and evenness of each step's weights. A
        mode in which m has no draws is not found.

        Raises ValueError for arguments out of range, without target or flow, and if m does not reach the target.
        """
        return anneal(self, particles, replicates, seed, progress, threads)

    def mcmc(
        self,
        method: str = "hmc",
        chains: int = 8,
        num_draws: int | None = None,
        warmup: int | None = None,
        seed: int | None = 0,
        progress: bool = True,
        threads: int | None = 1,
    ) -> Posterior:
        """A correction by Markov chains: a posterior whose weighted draws are their states, equally weighted.

        method: "hmc" or "nuts", chains by Pyro's kernels in the flow's latent space, where the flow has straightened p
        (NeuTra: Hoffman et al. 2019), from draws of this posterior; "imh" or "isir", independence Metropolis or
        iterated sampling importance resampling (Andrieu, Lee & Vihola 2018), whose proposals are the weighted draws at
        hand, begun where their total variation distance is bounded by .01 (Biswas, Jacob & Vanetti 2019).
        chains: at least 2; those of "nuts" and "hmc" are evaluated together, so that eight cost little more than one.
        num_draws, warmup: of each of these, 750 after 300 unless said. seed: the result depends on it alone; None:
        drawn from the global generator. progress: show a progress bar. threads: of torch, meanwhile.

        Returns a Posterior with the same flow, whose ``proposal`` holds the states; ``settings.corrections``
        says what was done. Its verdict is "corrected" or "unreliable", by R̂, ESS, precision and tails of every
        quantity, by divergences and energies, or by the bound and the tails of the weights, and by agreement with the
        importance weights, whose log_evidence it keeps. Chains that cannot move between modes show in R̂. Scales are
        moved, too, as in :meth:`anneal`, where draws do not reach down a neck; log_evidence is then a bridge to the
        states.

        Raises ValueError for arguments out of range and without target or flow.
        """
        return mcmc(self, method, chains, num_draws, warmup, seed, progress, threads)

    def rehearse(self, k: int = 20, seed: int = 0, **options: Any) -> Rehearsal:
        """Check fits of this model by k data sets drawn from the fit, each refitted together with the real data.

        What it says is in ``sentences`` and ``table()`` of the result, which is kept as ``rehearsal`` too: a bound on
        false claims, and how often intervals hold the values that made the data. More, and the options, in
        :func:`vi_flows.inference.rehearse.rehearse`. Raises ValueError for a density, and for a model whose data cannot
        be simulated.
        """
        self.rehearsal = rehearse(self, k, seed, **options)
        return self.rehearsal

    def save(self, path: str | Path) -> Path:
        """Write everything but the target to one safetensors file with a JSON header, atomically; returns its path."""
        return store.save(self, path)


def load(path: str | Path, target: Target | None = None, flow: Flow | None = None) -> Posterior:
    """Read a posterior back.

    Parameters
    ----------
    target: the density or ``PyroModel`` that was fitted; without it only the stored draws can be sampled.
    flow: needed only if the fit was given a flow of its own making (not a recipe): one of the same architecture.

    Raises
    ------
    ValueError if the file is not a posterior of this version, or the target's or flow's size differs.
    """
    return Posterior(**vars(store.read(path, target, flow)))
