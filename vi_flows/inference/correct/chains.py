"""Markov chains that correct a fit: Hamiltonian ones in the flow's latent space, independence ones on its weights."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arguments import one_of, whole
from ...progress import Progress
from ...running import seeded
from ...running import threads as torch_threads
from ..bounds import AGREEMENT, BFMI, DISTANCE, DIVERGENT, KHAT_BOUND, LEAST_ESS, RHAT, SHIFT
from ..estimate.evaluate import in_blocks
from ..estimate.psis import import_arviz, khat, khat_upper, resampling_weights
from ..estimate.quantities import PROBABILITIES, Estimates, carrying, estimate, flatten, resample_along
from ..estimate.weights import Weights, log_mean
from ..judge.check import Check, Role
from ..judge.checks import PROBABILITY_SE, SHIFTS, precision, sds, tails, tails_of_means, unseen_moments
from ..judge.fitted import Fitted
from ..judge.latent import LatentPath
from ..judge.necks import necks
from ..judge.proposal import DefensiveProposal
from . import independence, neutra
from .draws import bridge, evidence, quantities_of, replicate_se, walk_of_necks, with_draws, with_errors
from .smc import rescaled

HAMILTONIAN = ("nuts", "hmc")  # methods that need gradients; a name in neither is refused
# methods that do not, with the proposals in each step of i-SIR: more move more often, and leave fewer steps
INDEPENDENT = {"imh": None, "isir": 8}
CHAIN_DRAWS, WARMUP = 750, 300  # of each Hamiltonian chain: eight are evaluated together, at hardly the price of one
LEAST_STEPS = 100  # of an independence chain: of fewer, standard errors are guesses
# coupled pairs by which, and times at which, the distance of a chain from p is bounded: fewer pairs leave the bound to
# chance, fewer times find the burn-in late. Chosen, not measured
REPLICATES, TIMES = 1000, 200
# what to do with the draws, before all reasons: who reads one sentence reads this
CHAINS_LEAD = "use weighted draws (the default of sample): states of chains"


@dataclass(frozen=True, eq=False)
class Chains:
    """States x (chains, draws, dim) with log p (chains, draws), how they were made, and the checks of that kind.

    evidence: log Ẑ and its standard error, where states tell of it what weights do not.
    """

    x: Tensor
    log_p: Tensor
    words: str
    how: dict[str, Any]
    checks: tuple[Check, ...]
    evidence: tuple[float, float] | None = None


def mcmc(
    posterior: Fitted,
    method: str,
    chains: int,
    draws: int | None,
    warmup: int | None,
    seed: int | None,
    progress: bool,
    threads: int | None,
) -> Fitted:
    """Correct a posterior by Markov chains; see :meth:`Posterior.mcmc`."""
    _check_chains(posterior, method, chains, draws, warmup, threads)
    began = time.monotonic()
    with seeded(seed), torch_threads(threads), torch.no_grad(), Progress(progress) as bar:
        if method in HAMILTONIAN:
            made = _hamiltonian(posterior, method, chains, draws or CHAIN_DRAWS, warmup or WARMUP, bar)
        else:
            made = _independent(posterior, method, chains)
        result = _result(posterior, made)
    how = {"method": method, "chains": chains, "seed": seed, **result.settings.corrections["mcmc"]}
    result = dataclasses.replace(result, settings=posterior.settings.corrected("mcmc", how))
    result.timing["mcmc"] = time.monotonic() - began
    return result


def _check_chains(
    posterior: Fitted, method: str, chains: int, draws: int | None, warmup: int | None, threads: int | None
) -> None:
    one_of("method", method, (*HAMILTONIAN, *INDEPENDENT))
    if posterior.target is None:
        raise ValueError("mcmc: this posterior has no target; load it with vf.load(path, target=...)")
    for name, value, least in (("chains", chains, 2), ("num_draws", draws, 100), ("warmup", warmup, 50)):
        if value is None and name != "chains":
            continue
        whole(name, value, least)
        if name != "chains" and method in INDEPENDENT:
            raise ValueError(f"{name}: expected None for {method!r}, whose steps are the proposal's draws, got {value}")
    if threads is not None:
        whole("threads", threads)
    corrected = any(name in posterior.settings.corrections for name in ("anneal", "mcmc"))
    if method in INDEPENDENT and corrected:
        raise ValueError(f"method: expected nuts or hmc for draws that are corrected already, got {method!r}")


def _hamiltonian(posterior: Fitted, method: str, count: int, draws: int, warmup: int, bar: Progress) -> Chains:
    """NeuTra (Hoffman et al. 2019): Hamiltonian chains in the flow's latent space, where p is nearly its base."""
    flow = posterior._flow("mcmc")
    walk = walk_of_necks(posterior)
    path = LatentPath(DefensiveProposal(flow, posterior.modes), posterior.target, walk)
    starts = _starts(posterior, path, count)
    potential = neutra.Potential(functools.partial(path.log_prob, b=1), starts)
    bar.stage("chains", count * (warmup + draws))
    between = (lambda z: rescaled(path, path.at(z)).z) if walk else None
    chains = neutra.chains(method, potential, starts, draws, warmup, bar.advance, between)
    z = torch.cat([chain.z for chain in chains])
    found, energy = path.at(z), -in_blocks(potential.log_prob, z).reshape(count, draws)
    told = {name: [getattr(chain, name) for chain in chains] for name in ("divergences", "acceptance", "step")}
    words = f"{method}, {count} chains of {draws} draws after {warmup} of warm-up, in the flow's latent space"
    words += ", and moves of scales" if walk else ""
    words += f" (not recorded: {potential.refused})" if potential.refused else ""
    checks = (_divergences(told["divergences"], count * draws), _energy(energy, flow.dim))
    how = {"num_draws": draws, "warmup": warmup, **told}
    bridged = _bridged(path, (found.log_p - found.log_m).reshape(count, draws)) if walk else None
    return Chains(found.x.reshape(count, draws, -1), found.log_p.reshape(count, draws), words, how, checks, bridged)


def _bridged(path: LatentPath, log_w: Tensor) -> tuple[float, float]:
    """log Ẑ with its standard error from log p − log m of the chains' states (C, draws) and of as many draws of m."""
    first, _ = path.draw(log_w.numel())
    of_m = (first.log_p - first.log_m).reshape(log_w.shape)
    each = torch.tensor([bridge(a, b) for a, b in zip(of_m, log_w, strict=True)], dtype=torch.float64)
    return log_mean(each), replicate_se(each)


def _starts(posterior: Fitted, path: LatentPath, chains: int) -> Tensor:
    """z (chains, dim) of weighted draws of the proposal, spread over modes; a draw of q's where the inverse fails."""
    log_w = resampling_weights(posterior.proposal.log_w)
    x = posterior.proposal.x[resample_along(log_w, posterior.proposal.x, chains)]
    z = path.bijection.inverse_and_logdet(x)[0]
    return torch.where(z.isfinite().all(-1, keepdim=True), z, path.base.transform(path.base.noise((chains,))))


def _independent(posterior: Fitted, method: str, chains: int) -> Chains:
    """Independence chains that share out the proposal's draws, from the time on when they are close to the target."""
    draws, batch = posterior.proposal, INDEPENDENT[method]
    size = batch or 1
    steps = len(draws.x) // (chains * size)
    if steps < LEAST_STEPS:
        most = len(draws.x) // (LEAST_STEPS * size)
        raise ValueError(f"chains: expected at most {most} for the proposal's {len(draws.x)} draws, got {chains}")
    order = torch.randperm(len(draws.x), device=draws.x.device)[: chains * steps * size].reshape(chains, -1)
    log_w = draws.log_w[order].reshape(chains, steps, size)
    at = independence.independence_chains(log_w, independence.metropolis if batch is None else independence.isir)
    lag, seed = max(steps // 4, 1), int(torch.randint(2**31, ()))
    times = torch.logspace(0, math.log10(max(steps // 2, 1)), TIMES).long().unique()
    bounds = independence.total_variation_bound(draws.log_w, lag, times, REPLICATES, seed, batch)
    first = int((bounds < DISTANCE).to(torch.int8).argmax()) if bool((bounds < DISTANCE).any()) else -1
    warmup, bound = int(times[first]), float(bounds[first])
    kept = order.gather(1, at[:, warmup:])
    words = f"{method}, {chains} chains of {steps - warmup} draws after {warmup} of warm-up, on the proposal's draws"
    how = {"steps": steps, "begun": warmup, "lag": lag, "total_variation": bound}
    checks = (_distance(bound, warmup, steps), tails(draws.log_w))
    return Chains(draws.x[kept], draws.log_p[kept], words, how, checks)


def _result(posterior: Fitted, made: Chains) -> Fitted:
    """The posterior with the chains' states in place of the proposal's draws, judged by how the chains mix."""
    x, log_p = made.x.flatten(0, 1), made.log_p.flatten()
    # in the form of importance weights: log q = log p − log Ẑ, so that all weigh the same
    even = torch.full_like(log_p, -math.log(len(log_p)), dtype=torch.float64)
    drawn = Weights(x, even, torch.zeros_like(even))
    names, theta, columns = quantities_of(posterior.target, drawn)
    if not len(columns):
        raise ValueError("mcmc: expected chains that move, got none that does; start elsewhere by another seed= or fit")
    independent = estimate(theta, even)
    values = with_errors(independent, theta, functools.partial(_error_of_chains, chains=len(made.x)))
    mixing = _mixing(names, theta, len(made.x))
    unseen = unseen_moments(theta, values, even, len(theta))
    checks = [
        *mixing,
        *made.checks,
        precision(names, _thirds(values)),
        tails_of_means(names, unseen),
        sds(names, values, unseen),
        *_beside_weights(posterior, made, names, theta, columns, values),
        *posterior.verdict.carried(),
        *necks(posterior.target, drawn),
    ]
    note = _note(made, float((values.mean_se / independent.mean_se).nanmedian()))
    level, error = made.evidence or (posterior.log_evidence, posterior.log_evidence_se)
    how = {"rhat": mixing[0].statistic, "ess": LEAST_ESS / mixing[1].statistic, **made.how}
    result = with_draws(posterior, "mcmc", Weights(x, log_p - level, log_p), checks, (level, error), note, CHAINS_LEAD)
    return dataclasses.replace(result, settings=posterior.settings.corrected("mcmc", how))


def _beside_weights(
    posterior: Fitted, made: Chains, names: list[str], theta: Tensor, columns: Tensor, values: Estimates
) -> list[Check]:
    """Agreement with the importance weights; or, where these leave out a neck, the evidence that is told without."""
    if made.evidence:
        return [_alone("they leave out a neck"), evidence(made.evidence[1])]
    log_w = posterior.proposal.log_w
    alive = carrying(log_w)
    given = flatten(posterior.target.constrain(posterior.proposal.x[alive]))[1][:, columns]
    return [_agreement(names, theta, values, estimate(given, log_w[alive].double()), log_w)]


def _note(made: Chains, more: float) -> str:
    """How the chains were made, and what their errors and the posterior's other numbers are."""
    weights = "k̂ and ESS are those of the fit's importance weights"
    bridge_of = "log evidence is a bridge from the proposal to the states, "
    return (
        f"{made.words}; standard errors of means over the chains are, in the median, {more:.1f} times those of "
        f"independent draws, which summary() shows. {bridge_of if made.evidence else 'log evidence, '}{weights}."
    )


def _per_chain(theta: Tensor, chains: int) -> list[Any]:
    """theta (chains · draws, Q) as Q arrays (chains, draws), as ArviZ takes them."""
    return list(theta.reshape(chains, -1, theta.shape[-1]).permute(2, 0, 1).cpu().numpy())


def _error_of_chains(h: Tensor, chains: int) -> Tensor:
    """Standard errors (Q,) of means of h (chains · draws, Q): sd(h)/√ESS(h)."""
    ess = import_arviz().ess
    sizes = torch.tensor([float(ess(column, method="mean")) for column in _per_chain(h, chains)])
    return h.std(0) / sizes.to(h).sqrt()


def _mixing(names: list[str], theta: Tensor, chains: int) -> list[Check]:
    """Rank-normalised split R̂, and bulk and tail ESS (Vehtari et al. 2021), the worst over the quantities."""
    az = import_arviz()
    columns = _per_chain(theta, chains)
    rhat = torch.tensor([float(az.rhat(c)) for c in columns]).nan_to_num(math.inf)
    kinds = ("bulk", "tail")
    ess = torch.tensor([[float(az.ess(c, method=kind)) for c in columns] for kind in kinds]).nan_to_num(0.0)
    worst, where = float(rhat.max()), names[int(rhat.argmax())]
    mixed = f"the largest R̂ of the chains is {worst:.3f}, of {where}"
    apart = f"{mixed}, not below {RHAT}: they have not mixed, or cannot move between modes"
    least, kind = float(ess.min()), kinds[int(ess.amin(1).argmin())]
    sentence = f"the smallest ESS of the chains is {least:.0f}, {kind} of {names[int(ess.amin(0).argmin())]}"
    few = f"{sentence}, not above {LEAST_ESS:.0f}: raise num_draws="
    return [
        Check.of("R-hat", worst, RHAT, mixed, apart),
        Check.of("ESS", LEAST_ESS / max(least, 1e-9), 1.0, sentence, few),
    ]


def _divergences(counts: list[int], transitions: int) -> Check:
    share = sum(counts) / transitions
    sentence = f"{sum(counts)} of {transitions} transitions diverged"
    otherwise = f"{sentence}, not below {DIVERGENT:.1%}: a part of the target is too steep for the step size"
    return Check.of("divergences", share, DIVERGENT, sentence, otherwise)


def _energy(potential: Tensor, dim: int) -> Check:
    """E-BFMI of each chain (Betancourt 2016), from U (chains, draws) alone.

    E(ΔE)²/Var E of E = U + K, K ~ χ²_D/2 drawn anew at each step: so (ΔE)² has mean D, and E variance Var U + D/2.
    """
    worst = float((dim / (potential.var(1) + dim / 2)).nan_to_num(0.0).min())
    sentence = f"the smallest E-BFMI of the chains is {worst:.2f}"
    otherwise = f"{sentence}, not above {BFMI}: tails too heavy to be reached by momenta"
    return Check.of("energy", 1 / max(worst, 1e-9), 1 / BFMI, sentence, otherwise)


def _distance(bound: float, warmup: int, steps: int) -> Check:
    sentence = f"after {warmup} of {steps} steps the chains are within {bound:.3g} of the target in total variation"
    otherwise = f"{sentence}, not {DISTANCE}: a few draws carry most of the weight"
    return Check.of("total variation", bound, DISTANCE, sentence, otherwise)


def _thirds(values: Estimates) -> Estimates:
    """For :func:`precision`: probabilities to a third of what makes them wrong, for which 2,500 draws are enough, where
    PROBABILITY_SE asks for 10,000.
    """
    more = PROBABILITY_SE / (torch.tensor(SHIFTS, dtype=torch.float64)[:, None] / 3)
    return dataclasses.replace(values, probability_se=values.probability_se * more.to(values.probability_se))


def _agreement(names: list[str], theta: Tensor, values: Estimates, weighted: Estimates, log_w: Tensor) -> Check:
    """Means and probabilities below the weighted 5/50/95 % points against those of importance weights of m.

    They may differ by SHIFT and SHIFTS, or by 3 standard errors where that is more; not compared where k̂ is too large.
    """
    upper = khat_upper(khat(log_w), len(log_w))
    if not upper < KHAT_BOUND:
        return _alone(f"upper k̂ {upper:.2f}")
    below = (theta[:, None] <= weighted.quantiles).to(theta).mean(0)
    probabilities = (below - torch.tensor(PROBABILITIES).to(below)[:, None]).abs()
    error = AGREEMENT * torch.hypot(values.probability_se, weighted.probability_se)
    ratio = (probabilities / torch.maximum(error, torch.tensor(SHIFTS).to(error)[:, None])).amax(0)
    mean_error = AGREEMENT * torch.hypot(values.mean_se, weighted.mean_se)
    mean = (values.mean - weighted.mean).abs() / torch.maximum(mean_error, SHIFT * weighted.sd)
    ratio = torch.maximum(ratio, mean).nan_to_num(math.inf)
    worst, name = float(ratio.max()), names[int(ratio.argmax())]
    sentence = f"chains and importance weights differ most in {name}, by {worst:.2f} times what is allowed"
    return Check.of("agreement", worst, 1.0, sentence, sentence, Role.BESIDE)


def _alone(why: str) -> Check:
    sentence = f"importance weights are no measure ({why}): the chains stand alone"
    return Check("agreement", 0.0, 1.0, True, sentence, Role.BESIDE)
