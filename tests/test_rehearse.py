"""Simulated data against their laws; ranks and bounds against closed forms; right and wrong fitters told apart."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from scipy import stats

import vi_flows as vf
from vi_flows.inference.rehearse.ranks import Rate, Uniformity, normalised_ranks
from vi_flows.inference.rehearse.refits import RankCheck, Refit
from vi_flows.inference.rehearse.rehearse import Rehearsal, rehearse
from vi_flows.targets.pyro_simulate import check_prior, conditioned_on_data, simulate, with_data, with_replicate
from vi_flows.testing import simulation_based_calibration

PROGRAM = Path(__file__).parents[1] / "examples" / "benchmarks" / "sbc.py"
DOUBLE = {"dtype": torch.float64}
LOC, SD, NOISE = 1.0, 2.0, 3.0
Y = torch.tensor([0.5, -1.0, 4.0, 2.0, 3.5])
QUICK = {"flow": "gaussian", "steps": 30, "num_draws": 1000}


def normal(y):
    mu = pyro.sample("mu", dist.Normal(LOC, SD))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, NOISE), obs=y)


def conjugate(*data):
    """Mean and sd of mu given the data."""
    y = torch.cat([torch.as_tensor(part, **DOUBLE) for part in data])
    precision = 1 / SD**2 + len(y) / NOISE**2
    return (LOC / SD**2 + float(y.sum()) / NOISE**2) / precision, precision**-0.5


class Normal:
    """The posterior of mu in ``normal``, its sd scaled and its mean shifted (in sds), and called what it is told."""

    def __init__(self, target, scale=1.0, shift=0.0, status="reliable"):
        self.loc, self.sd = conjugate(*target.observed.values())
        self.scale, self.shift = scale, shift
        self.verdict = SimpleNamespace(status=status, checks=())

    def sample(self, n, seed=None):
        return {"mu": self.loc + self.sd * (self.shift + self.scale * torch.randn(n, **DOUBLE))}


def values(**named):
    return {name: torch.as_tensor(value, **DOUBLE) for name, value in named.items()}


# simulating


def test_simulated_data_follow_their_distribution():
    model = vf.PyroModel(normal, Y)
    torch.manual_seed(0)
    drawn = torch.stack([simulate(model, values(mu=5.0))["y"] for _ in range(400)])
    assert drawn.shape == (400, 5) and drawn.dtype == torch.float64
    z = (drawn - 5.0) / NOISE
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert float(torch.corrcoef(z.mT).triu(1).abs().max()) < 4 / 20


def test_densities_of_other_and_of_second_data():
    """log p of with_data and with_replicate against p(θ), p(y|θ) and p(y*|θ) by hand, at unconstrained x."""

    def model(y, counts):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        pyro.deterministic("double", 2 * mu)
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)
        pyro.sample("counts", dist.Poisson(sigma).expand([2]).to_event(1), obs=counts)

    target = vf.PyroModel(model, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0]))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), **DOUBLE)
    mu, sigma = x[:, :1], x[:, 1:].exp()

    def likelihood(data):
        normals = torch.distributions.Normal(mu, sigma).log_prob(data["y"].double()).sum(-1)
        return normals + torch.distributions.Poisson(sigma).log_prob(data["counts"].double()).sum(-1)

    torch.manual_seed(0)
    data = simulate(target, {name: value[0] for name, value in target.constrain(x).items()})
    assert data["counts"].dtype == torch.int64 and data["y"].shape == (3,)
    other, twice = with_data(target, data), with_replicate(target, data)
    torch.testing.assert_close(other.log_prob(x) - likelihood(data), target.log_prob(x) - likelihood(target.observed))
    torch.testing.assert_close(twice.log_prob(x), target.log_prob(x) + likelihood(data))
    assert set(twice.observed) == {"y", "counts", "y__replicate", "counts__replicate"} and twice.mode == "vmap"
    torch.testing.assert_close(twice.constrain(x), target.constrain(x))
    torch.testing.assert_close(other.observed["y"], data["y"])


def centred(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 5):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 2.0
    for i in pyro.plate("data", 2):
        pyro.sample(f"y{i}", dist.Normal(mu, scale), obs=y[i])


class Regression(PyroModule):
    """Weights of its own are float32, so that it runs in that."""

    def __init__(self):
        super().__init__()
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, y):
        slope = self.slope
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(slope + self.linear(y[:, None])[:, 0], 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:PyroModel. evaluating row by row")
@pytest.mark.parametrize("kind", ["reparametrised", "branching", "module"])
def test_densities_of_other_models(kind):
    """log p(θ) p(y*|θ) + (log p(θ) p(y|θ)² − log p(θ) p(y|θ)) = log p(θ) p(y|θ) p(y*|θ)."""
    reparametrised = poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})
    model = {"reparametrised": reparametrised, "branching": branching, "module": Regression()}[kind]
    target = vf.PyroModel(model, Y)
    x = torch.randn(3, target.dim, generator=torch.Generator().manual_seed(0), **DOUBLE)
    torch.manual_seed(0)
    data = simulate(target, {name: value[0] for name, value in target.constrain(x).items()})
    twice, again = with_replicate(target, data), with_replicate(target, target.observed)
    summed = with_data(target, data).log_prob(x) + again.log_prob(x) - target.log_prob(x)
    torch.testing.assert_close(twice.log_prob(x), summed, rtol=1e-6, atol=1e-5)
    assert twice.mode == target.mode and twice.dtype == target.dtype and twice.names == target.names


def test_what_is_read_from_an_observed_site_is_simulated_too():
    """y2 follows the value that pyro.sample returned for y1; masks and parameters stay."""

    def model(y, seen):
        scale = pyro.param("scale", torch.tensor(2.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        y1 = pyro.sample("y1", dist.Normal(mu, scale), obs=y[0])
        with poutine.mask(mask=seen):
            pyro.sample("y2", dist.Normal(y1, 1e-6).expand([2]).to_event(0), obs=y[1:])

    pyro.clear_param_store()
    target = vf.PyroModel(model, torch.tensor([0.3, 0.2, 0.1]), torch.tensor([True, False]))
    torch.manual_seed(0)
    drawn = [simulate(target, values(mu=100.0)) for _ in range(200)]
    first = torch.stack([data["y1"] for data in drawn])
    assert abs(float(first.mean()) - 100) < 4 * 2 / math.sqrt(200) and abs(float(first.std()) - 2) < 0.5
    assert all(float((data["y2"] - data["y1"]).abs().max()) < 1e-4 for data in drawn)
    data, x = drawn[0], torch.zeros(1, 1, **DOUBLE)
    gained = with_replicate(target, data).log_prob(x) - target.log_prob(x)
    normal_ = torch.distributions.Normal
    expected = normal_(0.0, 2.0).log_prob(data["y1"]) + normal_(data["y1"], 1e-6).log_prob(data["y2"][0])
    assert float(gained) == pytest.approx(float(expected), rel=1e-9)  # the masked entry counts nothing
    pyro.clear_param_store()


class Undrawable(dist.Normal):
    def sample(self, *args, **kwargs):
        raise NotImplementedError("no sampler")

    rsample = sample


def factored(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    pyro.factor("penalty", -(mu**2))


def scaled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)


def gaps(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=y > 0)


def undrawable(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", Undrawable(mu, 1.0).expand(y.shape).to_event(1), obs=y)


def prior_only(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def prior_reads(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    y0 = pyro.sample("y0", dist.Normal(mu, 1.0), obs=y[0])
    nu = pyro.sample("nu", dist.Normal(y0, 1.0))
    pyro.sample("y1", dist.Normal(nu, 1.0), obs=y[1])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (factored, "site 'penalty': expected data that can be simulated, got pyro.factor"),
        (scaled, "site 'y': expected a density of scale 1, got poutine.scale"),
        (gaps, "site 'y': expected data without gaps to simulate, got obs_mask="),
        (undrawable, "expected observed sites that can be drawn from, got NotImplementedError: no sampler"),
        (prior_only, "expected an observed site to simulate, got none"),
        (prior_reads, "site 'nu': expected a prior that reads no data"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(model, words):
    target = vf.PyroModel(model, Y)
    point = {name: value[0] for name, value in target.constrain(torch.zeros(1, target.dim, **DOUBLE)).items()}
    with pytest.raises(ValueError) as caught:
        simulate(target, point)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^(site|model)[^\n]*$"):
        simulation_based_calibration(model, 1, Y)


def test_improper_priors_have_no_sbc_but_can_be_simulated():
    def flat(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    target = vf.PyroModel(flat, Y)
    assert simulate(target, values(mu=0.0))["y"].shape == (5,)
    with pytest.raises(ValueError, match="site 'mu': expected a proper prior, got one under a mask"):
        check_prior(target, values(mu=0.0))
    with pytest.raises(ValueError, match="proper prior"):
        simulation_based_calibration(flat, 2, Y)
    check_prior(vf.PyroModel(normal, Y), values(mu=0.0))


def test_models_that_read_their_data_as_constants_are_named():
    def autoregression(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * y[:-1], 1.0).to_event(1), obs=y[1:])

    def covariates(table):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * table["data"][:, 0], 1.0).to_event(1), obs=table["data"][:, 1])

    def standardised(y):
        a = pyro.sample("a", dist.Normal(y.mean(), y.std()))
        pyro.sample("y", dist.Normal(a, 1.0).expand(y.shape).to_event(1), obs=(y - y.mean()) / y.std())

    def written_into(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        y[0] = 1.0
        pyro.sample("y", dist.Normal(a, 1.0).expand(y.shape).to_event(1), obs=y)

    point = values(a=0.5)
    assert conditioned_on_data(vf.PyroModel(autoregression, Y), point) == ["y"]
    assert conditioned_on_data(vf.PyroModel(covariates, {"data": torch.randn(6, 2)}), point) == []
    assert conditioned_on_data(vf.PyroModel(standardised, Y), point) == []
    assert conditioned_on_data(vf.PyroModel(written_into, Y), point) == []
    found = simulation_based_calibration(autoregression, 1, Y, fit=lambda target, seed: AtPrior())
    assert found.conditioned == ("y",)


class AtPrior:
    verdict = SimpleNamespace(status="reliable", checks=())

    def sample(self, n, seed=None):
        return {"a": torch.randn(n, **DOUBLE)}


# ranks and what follows


def test_ranks_of_a_further_draw_are_uniform_ties_or_not():
    torch.manual_seed(0)
    u = {"a": [], "b": []}
    for _ in range(400):
        draws = {"a": torch.randn(10, **DOUBLE), "b": torch.randint(3, (10,)).double(), "c": torch.ones(10)}
        truth = {"a": torch.randn(1, **DOUBLE), "b": torch.randint(3, (1,)).double(), "c": torch.ones(1)}
        found = normalised_ranks(draws, truth)
        assert set(found) == {"a", "b"}  # a constant has no rank
        for name, rank in found.items():
            u[name].append(rank)
    for ranks in u.values():
        assert stats.kstest(ranks, "uniform").pvalue > 1e-3
    draws, truth = torch.randn(3, 2), torch.tensor([[9.0, -9.0]])
    ranks = normalised_ranks({"t": draws}, {"t": truth})
    assert ranks["t[0]"] > 0.75 and ranks["t[1]"] < 0.25
    assert normalised_ranks({"t": torch.randn(3)}, {"t": torch.tensor([math.nan])}) == {}


def test_effect_sizes_of_known_errors():
    """For z ~ N(b, s²): coverage of level p is P(|z| < Φ⁻¹((1 + p)/2)), offset b, spread s; scipy's KS and χ²."""
    generator = torch.Generator().manual_seed(0)
    z = 0.3 + 1.5 * torch.randn(4000, generator=generator, **DOUBLE)
    found = Uniformity("q", torch.special.ndtr(z))
    assert found.offset == pytest.approx(0.3, abs=4 * found.offset_se) and found.offset_se < 0.03
    assert found.spread == pytest.approx(1.5, abs=4 * found.spread_se)
    law = stats.norm(0.3, 1.5)
    for level in (0.5, 0.9):
        c = stats.norm.ppf((1 + level) / 2)
        assert found.coverage(level).value == pytest.approx(law.cdf(c) - law.cdf(-c), abs=0.035)
    few = Uniformity("q", torch.rand(30, generator=generator, **DOUBLE))
    reference = stats.kstest(few.u.numpy(), "uniform", method="exact")
    assert few.distance == pytest.approx(reference.statistic)
    assert few.p_values["distance"] == pytest.approx(reference.pvalue)
    assert stats.kstwo.sf(few.band, 30) == pytest.approx(0.05)
    square = float(few.z.square().sum())
    assert few.p_values["spread"] == pytest.approx(2 * min(stats.chi2.cdf(square, 30), stats.chi2.sf(square, 30)))


@pytest.mark.parametrize(("count", "total"), [(0, 20), (3, 40)])
def test_one_sided_bound_is_that_of_the_binomial(count, total):
    p = Rate(count, total).upper
    assert stats.binom.cdf(count, total, p) == pytest.approx(0.05, rel=1e-6)
    assert Rate(5, 5).upper == 1 and Rate(0, 0).upper == 1


def test_claims_apart_and_json():
    rows = [Refit(i, "reliable", 1.0, {"a": 0.5, "b": 0.3 + 0.02 * i}) for i in range(8)]
    rows += [Refit(8, "corrected", 1.0, {"a": 0.5, "b": 0.004}), Refit(9, "corrected", 1.0, {"a": 0.5, "b": 0.002})]
    rows += [Refit(10, "unreliable", 1.0, {"a": 0.999999, "b": 0.5}), Refit(11, "error", 1.0, message="no")]
    found = RankCheck(rows)
    assert (len(found.claims), len(found.fits)) == (10, 11)
    assert rows[8].p_value == pytest.approx(0.016) and rows[9].p_value == pytest.approx(0.008)
    assert found.false_claims == Rate(1, 10)
    assert [q.coverage(0.9) for q in found.quantities()] == [Rate(10, 10), Rate(8, 10)]
    assert [len(q.u) for q in found.quantities(claimed=False)] == [11, 11]
    mean, se = found.coverage(0.9)
    assert mean == pytest.approx(0.9) and se == pytest.approx(math.sqrt(2 * 0.4**2 + 8 * 0.1**2) / math.sqrt(9 * 10))
    for made in (found, Rehearsal(rows, "reliable", ("y",)), RankCheck(rows[:1]), RankCheck([rows[-1]])):
        plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
        again = type(made).from_dict(plain)
        assert again.rows == made.rows and again.to_dict() == made.to_dict() and again.table() == made.table()
    table = found.table()
    assert "8 reliable, 2 corrected, 1 unreliable, 1 error" in table and "all fits" in table
    assert "1 of 10" in table.splitlines()[-1]


def test_resolution_is_what_eighty_percent_of_tests_see():
    generator = torch.Generator().manual_seed(0)
    rows = [Refit(i, "reliable", 1.0, {"a": float(u)}) for i, u in enumerate(torch.rand(25, generator=generator))]
    offset = RankCheck(rows).resolution
    z = offset + torch.randn(4000, 25, generator=generator, **DOUBLE)
    p = 2 * stats.norm.sf((z.mean(1).abs() * 5).numpy())
    assert float((p < 0.05 / 3).mean()) == pytest.approx(0.8, abs=0.03)


# simulation-based calibration


def test_exact_posteriors_pass():
    found = simulation_based_calibration(normal, 150, Y, seed=3, fit=lambda target, seed: Normal(target))
    assert found.departures() == [] and len(found.claims) == 150
    assert {q.name for q in found.quantities()} == {"mu", "log density"}
    assert found.false_claims.interval[0] <= 0.01
    for quantity in found.quantities():
        assert quantity.coverage(0.5).interval[0] < 0.5 < quantity.coverage(0.5).interval[1]
        assert quantity.coverage(0.9).interval[0] < 0.9 < quantity.coverage(0.9).interval[1]


@pytest.mark.parametrize(
    ("error", "test", "size"),
    [({"scale": 0.5}, "spread", 2.0), ({"scale": 2.0}, "spread", 0.5), ({"shift": 0.7}, "offset", -0.7)],
)
def test_wrong_posteriors_are_flagged_and_their_errors_measured(error, test, size):
    found = simulation_based_calibration(normal, 80, Y, fit=lambda target, seed: Normal(target, **error))
    (mu,) = [q for q in found.quantities() if q.name == "mu"]
    assert any(departure.startswith("mu: ") for departure in found.departures())
    assert getattr(mu, test) == pytest.approx(size, rel=0.3)
    if error == {"scale": 0.5}:
        assert found.false_claims.interval[0] > 0.01 and mu.coverage(0.9).interval[1] < 0.9


def test_a_posterior_that_forgets_its_data_shows_in_the_log_density():
    """Draws of the prior have uniform ranks in mu itself (Modrák et al. 2023)."""

    class Prior(Normal):
        def sample(self, n, seed=None):
            return {"mu": LOC + SD * torch.randn(n, **DOUBLE)}

    found = simulation_based_calibration(normal, 80, Y, fit=lambda target, seed: Prior(target))
    flagged = {departure.split(":")[0] for departure in found.departures()}
    assert flagged == {"log density"}


def test_wrong_posteriors_that_are_not_claimed_count_apart():
    def fitter(target, seed):
        if seed % 3 == 0:
            raise ValueError("no posterior today")
        return Normal(target, scale=0.1, status="unreliable") if seed % 3 == 1 else Normal(target)

    found = simulation_based_calibration(normal, 60, Y, fit=fitter)
    assert found.departures() == [] and found.departures(claimed=False)
    assert (len(found.claims), len(found.fits)) == (20, 40)
    assert found.rows[0].message == "ValueError: no posterior today" and found.rows[0].ranks == {}


def test_rows_are_kept_and_the_seed_is_all():
    def counted(target, seed):
        calls.append(seed)
        return Normal(target)

    calls, seen, state = [], [], torch.get_rng_state()
    found = simulation_based_calibration(normal, 4, Y, seed=5, fit=counted, report=seen.append)
    assert torch.equal(torch.get_rng_state(), state) and seen == found.rows and calls == [5, 6, 7, 8]
    torch.manual_seed(123)
    kept = [*found.rows[:2], dataclasses.replace(found.rows[2], status="error")]
    again = simulation_based_calibration(normal, 4, Y, seed=5, fit=counted, kept=kept)
    assert calls[4:] == [7, 8]  # what failed is tried again
    assert [row.ranks for row in again.rows] == [row.ranks for row in found.rows]
    assert len({row.ranks["mu"] for row in found.rows}) == 4


def test_quantities_of_the_user():
    found = simulation_based_calibration(
        normal, 3, Y, fit=lambda target, seed: Normal(target), quantities=lambda v: {"square": v["mu"] ** 2}
    )
    assert [q.name for q in found.quantities()] == ["square"]


def test_fits_of_our_own():
    """Gaussian fits of a conjugate model: data are those of the row, claimed, calibrated as far as few can tell."""
    made = []

    def fitter(target, seed):
        made.append((target, vf.fit(target, seed=seed, progress=False, **QUICK)))
        return made[-1][1]

    found = simulation_based_calibration(normal, 2, Y, fit=fitter)
    assert [row.status for row in found.rows] == ["reliable"] * 2 and found.departures() == []
    for target, posterior in made:
        loc, sd = conjugate(target.observed["y"])
        mu = posterior.sample(4000, seed=0)["mu"]
        assert float(mu.mean()) == pytest.approx(loc, abs=0.1 * sd) and float(mu.std()) == pytest.approx(sd, rel=0.1)
    assert not torch.equal(made[0][0].observed["y"], made[1][0].observed["y"])
    direct = simulation_based_calibration(normal, 1, Y, **QUICK)
    assert direct.rows[0].ranks == found.rows[0].ranks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simulation_based_calibration(normal, 0, Y), "n: expected a positive integer, got 0"),
        (lambda: simulation_based_calibration(vf.catalogue.funnel(), 3), "model: expected a Pyro model, got a density"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


# rehearsing


@pytest.fixture(scope="module")
def fitted():
    return vf.fit(normal, Y, progress=False, **QUICK)


def test_rehearsal(fitted):
    """Posterior SBC of a conjugate model; its rows depend on the seed alone, and those kept are not fitted again."""
    state, seen = torch.get_rng_state(), []
    found = fitted.rehearse(4, seed=2, steps=40, num_draws=1000, report=seen.append)
    assert found is fitted.rehearsal and torch.equal(torch.get_rng_state(), state) and seen == found.rows
    assert len(found.claims) == 4 and found.departures() == [] and found.status == "reliable"
    text = str(found)
    assert "4 data sets drawn from the fit" in text and f"at most {1 - 0.05 ** (1 / 4):.1%} (95 %)" in text
    assert "0 of 4 claims exclude the values" in text and "does not show" in text
    torch.manual_seed(5)
    again = rehearse(fitted, 1, seed=2, steps=40, num_draws=1000)
    assert [row.ranks for row in again.rows] == [row.ranks for row in found.rows[:1]]
    assert rehearse(fitted, 4, seed=2, kept=found.rows).rows == found.rows


def test_rehearsed_posteriors_condition_on_both_data_sets(fitted, monkeypatch):
    """Exact draws of p(θ|y, y*) are calibrated with θ*; those of p(θ|y*), and of p(θ|y), are not."""

    def with_fitter(parts, k=60):
        def fitter(target, *_):
            return Normal(SimpleNamespace(observed={name: target.observed[name] for name in parts}))

        monkeypatch.setattr("vi_flows.inference.rehearse.rehearse.fitted", fitter)
        return rehearse(fitted, k)

    assert with_fitter(["y", "y__replicate"]).departures() == []
    assert any(departure.startswith("mu") for departure in with_fitter(["y__replicate"]).departures())
    assert any(departure.startswith("log density") for departure in with_fitter(["y"]).departures())


def test_false_claims_of_overconfident_refits_show(fitted, monkeypatch):
    monkeypatch.setattr(
        "vi_flows.inference.rehearse.rehearse.fitted",
        lambda target, *_: Normal(target, scale=0.3, status="corrected"),
    )
    found = rehearse(fitted, 30)
    assert found.false_claims.interval[0] > 0.01
    text = "\n".join(found.sentences)
    assert "departs from what is right: mu: true values scatter" in text and "nothing departs" not in text
    monkeypatch.setattr(
        "vi_flows.inference.rehearse.rehearse.fitted", lambda target, *_: Normal(target, status="unreliable")
    )
    found = rehearse(fitted, 2)
    assert "nothing was claimed" in str(found) and found.false_claims.upper == 1


def test_rehearsal_refuses_in_one_line(fitted):
    density = vf.fit(vf.Energy(lambda x: (x**2).sum(-1), dim=1), progress=False, **QUICK)
    for posterior, k, words in (
        (fitted, 0, "rehearse: expected a positive integer, got 0"),
        (density, 2, "rehearse: expected the posterior of a Pyro model"),
        (vf.fit(factored, Y[0], progress=False, **QUICK), 2, "site 'penalty'"),
    ):
        with pytest.raises(ValueError) as caught:
            rehearse(posterior, k)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_program_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    monkeypatch.setattr("vi_flows.testing.sbc.fit_by_default", lambda target, **given: vf.fit(target, **given, **QUICK))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    chosen = ("--model", "normal", "--n", "1", "--json", str(out))
    assert "mu                 1  " in run(*chosen)
    (row,) = json.loads(out.read_text(encoding="utf-8"))
    changed = row | {"status": "corrected", "ranks": {"mu": 0.0001}}
    out.write_text(json.dumps([changed, row | {"model": "schools"}]), encoding="utf-8")
    assert "0 reliable, 1 corrected" in (again := run(*chosen)) and "1 of 1" in again
    assert json.loads(out.read_text(encoding="utf-8")) == [changed, row | {"model": "schools"}]
    with pytest.raises(SystemExit, match="2"):
        run("--n", "0")
    assert "--n: expected a positive integer, got 0" in capsys.readouterr().err
