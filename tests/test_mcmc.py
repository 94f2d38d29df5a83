"""Corrections by Markov chains against closed forms: chains, their bound and verdict, what is refused."""

import dataclasses
import itertools
import json
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.flows.layers.linear import LowerTriangular
from vi_flows.flows.parameters import Fixed
from vi_flows.inference.correct import chains as mcmc
from vi_flows.inference.correct import independence, neutra
from vi_flows.inference.correct.draws import with_errors
from vi_flows.inference.estimate.quantities import estimate
from vi_flows.inference.judge.check import Check, Role, Verdict

LOC, COVARIANCE = torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 1.2], [1.2, 4.0]]).double()
FEW = {"chains": 4, "num_draws": 250, "warmup": 100, "seed": 2}
QUICK = {"progress": False, "num_draws": 1000}
FEWER = {"chains": 2, "num_draws": 100, "warmup": 50}


def correlated(x):
    """N(LOC, COVARIANCE), times e."""
    offset = x - LOC
    square = (offset @ torch.linalg.inv(COVARIANCE) * offset).sum(-1)
    return 1 - 0.5 * square - 0.5 * torch.logdet(COVARIANCE) - math.log(2 * math.pi)


def two_modes(x):
    """Equal parts N(−12, 1) and N(12, 1) in the first of two coordinates."""
    return torch.stack([-0.5 * (x[:, 0] + c).square() for c in (-12, 12)]).logsumexp(0) - 0.5 * x[:, 1].square()


def gaussian_flow(loc, tril):
    """The exact law N(loc, tril trilᵀ) as a flow."""
    loc, tril = (torch.as_tensor(value, dtype=torch.float64) for value in (loc, tril))
    base = vf.bases.StandardNormal(len(loc)).double()
    return vf.Flow([Fixed(LowerTriangular, shift=loc, scale_tril=tril)], base).requires_grad_(False)


def conjugate(y):
    """y_i ~ N(μ, 1), μ ~ N(0, 2²); σ = e^s, s ~ N(0, 1) of its own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("twice", 2 * mu)
    pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def wrong():
    """A correlated Gaussian, judged by a flow that is shifted, too narrow and uncorrelated."""
    target = vf.LogDensity(correlated, dim=2)
    return vf.diagnose(
        gaussian_flow([0.5, -1.0], torch.diag(torch.tensor([0.8, 1.2]))), target, progress=False, num_draws=1000
    )


@pytest.fixture(scope="module")
def nuts(wrong):
    return wrong.mcmc(**FEW)


def weights_of(posterior):
    return posterior.proposal.log_w


def standard_errors(posterior):
    """z-scores of means, and errors of the sds, against the correlated Gaussian's."""
    x, chains = posterior.proposal.x, posterior.settings.corrections["mcmc"]["chains"]
    values = with_errors(
        estimate(x, torch.zeros(len(x), dtype=x.dtype)), x, partial(mcmc._error_of_chains, chains=chains)
    )
    sd = COVARIANCE.diagonal().sqrt()
    return (values.mean - LOC) / values.mean_se, (values.sd / sd).log() / values.log_sd_se


@pytest.mark.parametrize("method", ["nuts", "hmc", "imh", "isir"])
def test_moments_of_a_correlated_gaussian(wrong, nuts, method):
    options = FEW if method == "hmc" else {"chains": 4}
    result = nuts if method == "nuts" else wrong.mcmc(method, **options)
    for z in standard_errors(result):
        assert z.abs().max() < 4
    correlation = torch.corrcoef(result.proposal.x.mT)[0, 1]
    assert abs(float(correlation) - 0.6) < 0.08
    assert result.log_evidence == wrong.log_evidence
    assert weights_of(result).std() < 1e-9
    checks = {c.name: c for c in result.verdict.checks}
    assert checks["R-hat"].statistic < 1.05
    assert checks["agreement"].passed


def test_precise_chains_are_corrected(wrong):
    fitted = vf.diagnose(
        gaussian_flow(LOC, torch.linalg.cholesky(COVARIANCE)), wrong.target, progress=False, num_draws=1000
    )
    result = fitted.mcmc("hmc", num_draws=600, warmup=100)
    assert result.verdict.status == "corrected", result.verdict.reasons
    settings = result.settings.corrections["mcmc"]
    assert settings["divergences"] == [0] * 8
    assert 0.6 < min(settings["acceptance"]) <= 1
    for z in standard_errors(result):
        assert z.abs().max() < 4


def test_model_with_names():
    y = torch.tensor([1.0, 2.0, 1.5, 0.5])
    fitted = vf.fit(conjugate, y, flow="gaussian", steps=20, progress=False)
    result = fitted.mcmc(**FEW)
    variance = 1 / (1 / 4 + len(y))
    draws = result.sample(1000, seed=0)
    assert set(draws) == {"mu", "sigma", "twice"}
    assert abs(float(draws["mu"].mean()) - variance * float(y.sum())) < 5 * math.sqrt(variance / 500)
    assert float(draws["mu"].std()) == pytest.approx(math.sqrt(variance), rel=0.15)
    assert float(draws["sigma"].log().std()) == pytest.approx(0.3, rel=0.15)
    assert torch.equal(draws["twice"], 2 * draws["mu"])
    assert any(note.startswith("mcmc: hmc, 4 chains of 250 draws after 100") for note in result.notes)


def test_chains_that_cannot_move_between_modes():
    target = vf.LogDensity(two_modes, dim=2)
    fitted = vf.fit(target, flow="gaussian", steps=20, progress=False)
    result = fitted.mcmc(chains=4, num_draws=100, warmup=50, seed=1)
    assert result.verdict.status == "unreliable"
    assert any("cannot move between modes" in reason for reason in result.verdict.reasons)
    starts = result.proposal.x.reshape(4, 100, 2)[:, 0, 0]
    assert 0 < int((starts > 0).sum()) < 4  # spread over the modes, so that R̂ can tell


@pytest.mark.parametrize("method", ["imh", "isir"])
def test_independence_chains_cannot_say_more_than_their_weights(wrong, method):
    """Weights with a Pareto tail of shape 1.2, which have no mean: the largest ones seen tell nothing of the rest."""
    u = torch.rand(len(wrong.proposal.x), dtype=torch.float64)
    heavy = dataclasses.replace(wrong.proposal, log_q=wrong.proposal.log_p + 1.2 * u.log())
    result = dataclasses.replace(wrong, proposal=heavy).mcmc(method, chains=4)
    assert result.verdict.status == "unreliable"
    failed = {c.name for c in result.verdict.checks if not c.passed}
    assert {"tails", "total variation"} <= failed


def test_posterior_of_the_same_kind(wrong, nuts, tmp_path):
    assert type(nuts) is type(wrong)
    assert "mcmc" not in wrong.settings.corrections
    assert json.loads(json.dumps(nuts.settings.corrections["mcmc"]))["num_draws"] == 250
    assert nuts.summary()["mean"].to_numpy() == pytest.approx(LOC.numpy(), abs=0.3)
    again = vf.load(nuts.save(tmp_path / "chains.safetensors"), target=wrong.target)
    assert torch.equal(again.sample(50, seed=2), nuts.sample(50, seed=2))
    assert again.settings.corrections["mcmc"] == nuts.settings.corrections["mcmc"]
    twice = nuts.mcmc(**FEWER)
    assert len([note for note in twice.notes if note.startswith("mcmc:")]) == 1


def test_seed_alone_decides_and_the_global_generator_is_left(wrong):
    state = torch.get_rng_state()
    first, again, other = (wrong.mcmc(**FEWER, seed=seed).proposal.x for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    a, b = (wrong.mcmc("imh", chains=4, seed=0).proposal.x for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gibbs"}, r"^method: expected one of nuts, hmc, imh, isir, got 'gibbs'$"),
        ({"chains": 1}, r"^chains: expected an integer of at least 2, got 1$"),
        ({"num_draws": 10}, r"^num_draws: expected an integer of at least 100, got 10$"),
        ({"warmup": True}, r"^warmup: expected an integer of at least 50, got True$"),
        ({"threads": 0}, r"^threads: expected a positive integer, got 0$"),
        ({"method": "isir", "chains": 900}, r"^chains: expected at most \d+ for the proposal's \d+ draws, got 900$"),
        ({"method": "imh", "num_draws": 500}, r"^num_draws: expected None for 'imh', .*, got 500$"),
    ],
)
def test_refusals(wrong, options, message):
    with pytest.raises(ValueError, match=message):
        wrong.mcmc(**options)


def test_refused_without_target_and_for_corrected_draws(nuts, tmp_path):
    with pytest.raises(ValueError, match=r"^mcmc: .* no target; load it with"):
        vf.load(nuts.save(tmp_path / "chains.safetensors")).mcmc()
    with pytest.raises(ValueError, match=r"^method: expected nuts or hmc .*, got 'imh'$"):
        nuts.mcmc("imh")


# --- potentials, and chains side by side ---


def test_potential_is_the_target_in_latent_space():
    flow = vf.recipes.spline(2).double().requires_grad_(False)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1 * torch.randn_like(p)
    bijection = flow().bijection

    def log_prob(z):
        x, logdet = bijection.forward_and_logdet(z)
        return correlated(x) + logdet

    potential = neutra.Potential(log_prob, torch.randn(3, 2, dtype=torch.float64))
    assert potential.refused == ""
    assert potential.program is not None
    for rows in (1, 2, 3):
        z = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(-log_prob(z).sum(), z)
        value, found = potential(z.detach())
        torch.testing.assert_close(value, -log_prob(z.detach()))
        torch.testing.assert_close(found, gradient)


def test_potential_that_cannot_be_recorded_is_evaluated_directly():
    def branching(z):
        return -0.5 * z.square().sum(-1) if float(z.sum()) < 1e9 else 0 * z.sum(-1)

    z = torch.randn(3, 2, dtype=torch.float64)
    potential = neutra.Potential(branching, z)
    assert "reads values" in potential.refused
    torch.testing.assert_close(potential(z), (0.5 * z.square().sum(-1), z))


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_density_that_is_zero_in_places(method):
    """The half z₀ < 0 of a normal: U is +inf without a gradient beyond, and no chain goes there."""

    def half(z):
        return torch.where(z[:, 0] < 0, -0.5 * z.square().sum(-1), -torch.inf)

    starts = torch.tensor([[-1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    potential = neutra.Potential(half, starts)
    value, gradient = potential(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert (float(value), gradient.tolist()) == (math.inf, [[0.0, 0.0]])
    for chain in neutra.chains(method, potential, starts, 60, 40, lambda: None):
        assert (chain.z[:, 0] < 0).all()
        assert len(chain.z.unique(dim=0)) > 20


def test_together_answers_all_in_one_call():
    calls = []

    def evaluate(z):
        calls.append(len(z))
        return z.sum(-1), 2 * z

    def worker(k):
        def run(ask):
            total = 0.0
            for _ in range(k):
                value, gradient = ask(torch.full((2,), float(k)))
                total += float(value) + float(gradient[0])
            return total

        return run

    assert neutra.together([worker(k) for k in (1, 2, 3)], evaluate) == [4.0, 16.0, 36.0]
    assert calls == [3, 2, 1]


def test_errors_of_a_chain_and_of_the_target_end_all_threads():
    import threading

    before = threading.active_count()

    def fails(ask):
        ask(torch.zeros(1))
        raise ArithmeticError("in a worker")

    def waits(ask):
        while True:
            ask(torch.zeros(1))

    with pytest.raises(ArithmeticError, match="in a worker"):
        neutra.together([waits, fails, waits], lambda z: (z[:, 0], z))

    def interrupted(z):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neutra.together([waits, waits], interrupted)
    assert threading.active_count() == before


def test_energy_is_that_of_the_successive_differences():
    """E-BFMI from U alone against the usual estimate from energies, for independent draws of a normal."""
    z, momenta = torch.randn(2, 20_000, 5, dtype=torch.float64)
    u, kinetic = 0.5 * z.square().sum(-1), 0.5 * momenta.square().sum(-1)
    end = 0.5 * torch.randn(20_000, 5, dtype=torch.float64).square().sum(-1)  # of the step before, at the same place
    change = (u[1:] + kinetic[1:]) - (u[1:] + end[1:])
    usual = float(change.square().mean() / (u + kinetic).var())
    check = mcmc._energy(u[None], 5)
    assert 1 / check.statistic == pytest.approx(usual, rel=0.05)
    assert check.passed
    assert not mcmc._energy(torch.randn(1, 1000).exp() * 50, 5).passed


# --- independence chains ---


def transition(w, kernel, batch):
    """The exact transition matrix of a chain on the states 0.. whose proposals are uniform over them."""
    n = len(w)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for proposals in itertools.product(range(n), repeat=batch):
            if kernel is independence.metropolis:
                accept = min(1.0, float(w[proposals[0]] / w[i]))
                moves = {proposals[0]: accept}
            else:
                total = float(w[list(proposals)].sum() + w[i])
                moves = {}
                for j in proposals:
                    moves[j] = moves.get(j, 0.0) + float(w[j]) / total
            for j, probability in moves.items():
                matrix[i, j] += probability / n**batch
            matrix[i, i] += (1 - sum(moves.values())) / n**batch
    return matrix


def distances(w, matrix, times):
    """Total variation between w/Σw and the law at these times of a chain that starts uniformly."""
    start, target = torch.full_like(w, 1 / len(w)), w / w.sum()
    return torch.tensor([float(0.5 * (start @ matrix.matrix_power(t) - target).abs().sum()) for t in times])


@pytest.mark.parametrize(("kernel", "batch"), [(independence.metropolis, None), (independence.isir, 2)])
@pytest.mark.parametrize("log_w", [[0.0, 0.5, 1.0, 2.0, 3.5], [0.0, 0.1, -0.1, 0.2, 0.0]])
def test_bound_against_the_exact_distance(kernel, batch, log_w):
    log_w = torch.tensor(log_w, dtype=torch.float64)
    matrix = transition(log_w.exp(), kernel, batch or 1)
    torch.testing.assert_close(log_w.exp() @ matrix, log_w.exp())  # the kernel leaves the target as it is
    times = [0, 1, 2, 5, 10, 20, 40]
    exact = distances(log_w.exp(), matrix, times)
    for lag in (1, 5, 50):
        bound = independence.total_variation_bound(log_w, lag, times, replicates=20_000, batch=batch)
        assert (bound > exact - 0.01).all(), (lag, bound, exact)
    assert bound[4] < 0.2  # with a long lag it is not far above
    assert bound.diff().max() <= 0


def test_bound_by_simulated_metropolis_pairs():
    """The closed form over meeting times against pairs of chains that are coupled step by step."""
    log_w, lag, times = 1.5 * torch.randn(200, dtype=torch.float64), 7, torch.tensor([0, 1, 3, 10, 30])
    bound = independence.total_variation_bound(log_w, lag, times, replicates=20_000)
    w, pairs = log_w.exp(), 20_000
    x, y = w[torch.randint(200, (2, pairs))]
    for _ in range(lag):
        new = w[torch.randint(200, (pairs,))]
        x = torch.where(torch.rand(pairs) * x < new, new, x)
    met = torch.zeros(pairs)
    for t in range(1, 2000):
        new, u = w[torch.randint(200, (pairs,))], torch.rand(pairs)
        a, b = u * x < new, u * y < new
        met[(met == 0) & a & b] = t
        x, y = torch.where(a, new, x), torch.where(b, new, y)
    simulated = ((met - times[:, None]) / lag).ceil().clamp_min(0)
    error = simulated.std(1) / math.sqrt(pairs)
    assert ((simulated.mean(1) - bound).abs() < 6 * error + 1e-4).all()


def test_bound_of_draws_without_weight_and_of_even_weights():
    even = independence.total_variation_bound(torch.zeros(100, dtype=torch.float64), 5, [0, 1])
    assert even.tolist() == [1.0, 0.0]  # the first proposal is accepted
    dead = torch.full((100,), -math.inf, dtype=torch.float64)
    dead[:50] = 0.0
    bound = independence.total_variation_bound(dead, 20, range(12), replicates=5000)
    assert bound.tolist() == pytest.approx([0.5**t for t in range(12)], abs=1e-3)  # moves when a draw has weight
    for log_w in (dead[50:], dead[:1] * torch.inf, dead[None]):
        with pytest.raises(ValueError, match=r"^log_w: expected log-weights"):
            independence.total_variation_bound(log_w, 5, [1])
    with pytest.raises(ValueError, match=r"^lag: expected a positive integer, got 0$"):
        independence.total_variation_bound(dead, 0, [1])


@pytest.mark.parametrize("kernel", [independence.metropolis, independence.isir])
def test_runs_have_the_target_as_their_law(kernel):
    """Frequencies of states over many short chains against the exact law at that time."""
    log_w = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    batch, steps = 1 if kernel is independence.metropolis else 2, 4
    index = torch.randint(3, (20_000, steps, batch))
    at = independence.independence_chains(log_w[index], kernel)
    matrix = transition(log_w.exp(), kernel, batch)
    for t in range(steps):
        states = index.reshape(20_000, -1).gather(1, at[:, t : t + 1])[:, 0]
        expected = torch.full((3,), 1 / 3, dtype=torch.float64) @ matrix.matrix_power(t)
        assert (torch.bincount(states, minlength=3) / 20_000 - expected).abs().max() < 0.015


# --- the verdict ---


def test_agreement_tells_a_missed_mode():
    """Chains that all stay in the mode of 70 %: R̂ is perfect, the weights are not fooled."""
    x = torch.cat([torch.randn(28_000, 1) + 6, torch.randn(12_000, 1) - 6]).double()
    log_w = 0.3 * torch.randn(40_000, dtype=torch.float64)
    weighted = estimate(x, log_w)
    one = 6 + torch.randn(2000, 1, dtype=torch.float64)
    values = with_errors(estimate(one, torch.zeros(2000).double()), one, partial(mcmc._error_of_chains, chains=4))
    mixed, _ = mcmc._mixing(["x"], one, 4)
    assert mixed.passed
    check = mcmc._agreement(["x"], one, values, weighted, log_w)
    assert not check.passed
    both = x[torch.randperm(len(x))[:2000]]
    values = with_errors(estimate(both, torch.zeros(2000).double()), both, partial(mcmc._error_of_chains, chains=4))
    assert mcmc._agreement(["x"], both, values, weighted, log_w).passed


def test_verdict_keeps_what_chains_cannot_tell(wrong, nuts):
    """A fit that found a basin outside m, or no end of its tails, is not mended by chains from its draws."""
    failed = Check("proper", 1.0, 0.5, False, "mass far out", Role.TARGET)
    bad = Verdict.of([*(c for c in nuts.verdict.checks if c.passed), failed], mcmc.CHAINS_LEAD)
    assert bad.status == "unreliable"
    assert "mass far out" in bad.reasons
    assert Verdict.of([c for c in nuts.verdict.checks if c.passed], mcmc.CHAINS_LEAD).status == "corrected"


def test_errors_are_those_of_autocorrelated_chains():
    """AR(1) chains of correlation ρ: se(mean)² = (1 + ρ)/(1 − ρ)/n."""
    rho, n, chains = 0.7, 2000, 4
    x = torch.randn(chains, n, dtype=torch.float64)
    for t in range(1, n):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * x[:, t]
    flat = x.reshape(-1, 1)
    values = with_errors(
        estimate(flat, torch.zeros(len(flat)).double()), flat, partial(mcmc._error_of_chains, chains=chains)
    )
    assert float(values.mean_se) == pytest.approx(math.sqrt((1 + rho) / (1 - rho) / (n * chains)), rel=0.15)
    assert float(values.log_sd_se) == pytest.approx(math.sqrt((1 + rho**2) / (1 - rho**2) / (2 * n * chains)), rel=0.15)
