"""fit end to end: closed forms, the verdict where it must refuse, options, errors, files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import signal
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.inference import candidates as fit_module
from vi_flows.inference.estimate.weights import log_weights, mean_elbo
from vi_flows.inference.options import Options
from vi_flows.inference.train import loop as training
from vi_flows.inference.train.loop import train
from vi_flows.running import FLOOR, Clock, late

Normal = torch.distributions.Normal
QUICK = {"progress": False, "steps": 150, "particles": 128, "num_draws": 2000}


def mixture(distance: float, share: float = 0.5, dim: int = 2) -> vf.LogDensity:
    def log_prob(x):
        left = Normal(-distance, 1.0).log_prob(x).sum(-1) + math.log(1 - share)
        return torch.logaddexp(left, Normal(distance, 1.0).log_prob(x).sum(-1) + math.log(share))

    return vf.LogDensity(log_prob, dim=dim)


@pytest.fixture(scope="module")
def gaussian():
    mean = torch.tensor([1.0, -2.0, 30.0]).double()
    covariance = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 25.0]]).double()
    law = torch.distributions.MultivariateNormal(mean, covariance)
    target = vf.LogDensity(lambda x: law.log_prob(x) + 7.0, dim=3)
    return mean, covariance, target, vf.fit(target, progress=False)


def test_gaussian_density(gaussian):
    mean, covariance, _, post = gaussian
    assert post.verdict.status == "reliable"
    assert abs(post.log_evidence - 7.0) < 3 * post.log_evidence_se + 1e-4
    assert post.elbo <= 7.0 + 1e-3 and post.elbo > 6.999
    x = post.sample(20_000, seed=1)
    sd = covariance.diagonal().sqrt()
    assert (((x.mean(0) - mean) / sd).abs() < 0.03).all()
    assert torch.allclose(torch.cov(x.mT), covariance, rtol=0.05, atol=0.1)


def test_draws_and_weights_are_aligned(gaussian):
    _, _, target, post = gaussian
    assert torch.allclose(
        target.log_prob(post.flow_draws) - post.log_prob(post.flow_draws), post.log_weights, atol=1e-9
    )
    assert 1 <= post.ess <= len(post.flow_draws) == 10_000
    assert post.khat_interval[0] <= post.khat <= post.khat_interval[1]


def test_summary_is_a_table_with_errors(gaussian):
    mean, covariance, _, post = gaussian
    table = post.summary()
    assert list(table.index) == ["x[0]", "x[1]", "x[2]"]
    for i in range(3):
        row = table.iloc[i]
        assert abs(row["mean"] - float(mean[i])) < 5 * row["mcse_mean"]
        assert row["sd"] == pytest.approx(float(covariance[i, i]) ** 0.5, rel=0.03)
        assert row["5%"] < row["50%"] < row["95%"]
    assert "reliable" in post.describe() and "k̂" in post.describe()


def test_save_and_load(gaussian, tmp_path):
    _, _, target, post = gaussian
    path = post.save(tmp_path / "deep" / "posterior.safetensors")
    again = vf.load(path, target=target)
    assert torch.equal(again.flow_draws, post.flow_draws) and torch.equal(again.log_weights, post.log_weights)
    assert torch.allclose(again.log_prob(post.flow_draws[:50]), post.log_prob(post.flow_draws[:50]), rtol=0, atol=1e-12)
    assert torch.equal(again.sample(100, seed=3), post.sample(100, seed=3))
    assert again.verdict == post.verdict and again.khat_interval == post.khat_interval
    alone = vf.load(path)
    assert alone.sample(100).shape == (100, 3)
    assert alone.summary().shape == (3, 9)
    with pytest.raises(ValueError, match="num_draws: expected at most the 10000 stored draws"):
        alone.sample(20_000)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_load_refuses_what_is_not_a_posterior(gaussian, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"path: .*not a readable safetensors file"):
        vf.load(path)
    saved = gaussian[3].save(tmp_path / "good.safetensors")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match="path:"):
        vf.load(saved)
    with pytest.raises(FileNotFoundError):
        vf.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="target: expected dim 3, got 2"):
        vf.load(gaussian[3].save(tmp_path / "good.safetensors"), target=mixture(6.0))
    with pytest.raises(ValueError, match="path: expected a file name, got the folder"):
        gaussian[3].save(tmp_path)


def test_conjugate_normal_model():
    """μ ~ N(0, 2²), y_i ~ N(μ, 1): posterior and evidence in closed form."""
    y = torch.tensor([1.2, 0.3, 2.1, 1.7, 0.9])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    precision = 1 / 4 + len(y)
    mean, sd = float(y.sum()) / precision, precision**-0.5
    covariance = 4 * torch.ones(5, 5).double() + torch.eye(5).double()
    evidence = float(torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(y.double()))
    post = vf.fit(model, y, progress=False)
    assert post.verdict.status == "reliable"
    assert abs(post.log_evidence - evidence) < 3 * post.log_evidence_se + 1e-4
    mu = post.sample(20_000, seed=0)["mu"]
    assert mu.shape == (20_000,)
    assert float(mu.mean()) == pytest.approx(mean, abs=0.03 * sd)
    assert float(mu.std()) == pytest.approx(sd, rel=0.03)


def test_beta_binomial_model_with_deterministic_site():
    """p ~ Beta(2, 3), k ~ Binomial(20, p), k = 7: p | k ~ Beta(9, 16)."""

    def model():
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.deterministic("odds", p / (1 - p))
        pyro.sample("k", dist.Binomial(20, p), obs=torch.tensor(7.0))

    post = vf.fit(vf.PyroModel(model), progress=False)
    beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    evidence = math.log(math.comb(20, 7)) + beta(9, 16) - beta(2, 3)
    assert post.verdict.status == "reliable"
    assert abs(post.log_evidence - evidence) < 3 * post.log_evidence_se + 1e-4
    draws = post.sample(20_000, seed=0)
    exact = torch.distributions.Beta(9.0, 16.0)
    assert set(draws) == {"p", "odds"}
    assert float(draws["p"].mean()) == pytest.approx(9 / 25, abs=0.003)
    assert float(draws["p"].std()) == pytest.approx(float(exact.variance) ** 0.5, rel=0.03)
    assert torch.allclose(draws["odds"], draws["p"] / (1 - draws["p"]))
    assert float(draws["odds"].mean()) == pytest.approx(9 / 15, abs=0.01)


def test_energy_is_minus_log_density():
    """A double-well in one coordinate: moments and log Z by quadrature."""
    grid = torch.linspace(-4, 4, 20_001).double()
    density = (-(grid**4) + 1.5 * grid**2 + 0.3 * grid).exp()
    log_z = math.log(float(torch.trapezoid(density, grid)))
    mean = float(torch.trapezoid(grid * density, grid)) / math.exp(log_z)
    post = vf.fit(vf.Energy(lambda x: (x**4 - 1.5 * x**2 - 0.3 * x).sum(-1), dim=1), progress=False)
    assert post.verdict.status in ("reliable", "corrected")
    assert abs(post.log_evidence - log_z) < 4 * post.log_evidence_se + 1e-3
    assert float(post.sample(20_000, seed=0).mean()) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize(("distance", "share", "dim"), [(6.0, 0.5, 2), (6.0, 0.9, 1), (8.0, 0.5, 8), (8.0, 0.1, 8)])
def test_a_missed_mode_is_never_called_reliable(distance, share, dim):
    """Two far Gaussians: q sits on one; its own weights are perfect, the defensive proposal tells."""
    post = vf.fit(mixture(distance, share, dim), **QUICK)
    seen = post.sample(4000, seed=0)
    right = abs(float((seen[:, 0] > 0).double().mean()) - share) < 0.05
    assert post.verdict.status == "unreliable" or right
    assert post.verdict.status != "reliable" or post.elbo > -0.05
    assert abs(post.log_evidence) < 4 * post.log_evidence_se + 0.02


@pytest.mark.parametrize("recipe", vf.recipes.__all__)
def test_every_recipe_fits_and_never_beats_log_z(recipe):
    """A normalised curved density: ELBO ≤ log Z + 3 se, and not below the Gaussian that it started from."""

    def log_prob(x):
        return Normal(0.0, 1.0).log_prob(x[:, 0]) + Normal(0.5 * x[:, 0] ** 2, 0.7).log_prob(x[:, 1])

    post = vf.fit(vf.LogDensity(log_prob, dim=2), flow=recipe, **QUICK)
    assert post.elbo <= 3 * float(post.log_weights.std()) / len(post.flow_draws) ** 0.5
    assert post.elbo > -0.35
    assert abs(post.log_evidence) < 4 * post.log_evidence_se + 0.01
    assert recipe in post.flow_description


def test_same_seed_same_result_and_global_rng_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = [vf.fit(mixture(1.0), seed=3, **QUICK) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].flow_draws, runs[1].flow_draws) and runs[0].log_evidence == runs[1].log_evidence
    other = vf.fit(mixture(1.0), seed=4, **QUICK)
    assert not torch.equal(runs[0].flow_draws, other.flow_draws)
    assert torch.get_default_dtype() == torch.float32


def test_flow_forms():
    target = mixture(1.0)
    given = vf.recipes.planar(2, layers=3)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    assert vf.fit(target, flow=given, **QUICK).flow_description.startswith("the flow given")
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())  # copied
    assert vf.fit(target, flow=lambda dim: vf.recipes.realnvp(dim, layers=2), **QUICK).dim == 2
    with pytest.raises(ValueError, match=r"flow: expected .auto. or one of .*, got 'plannar'"):
        vf.fit(target, flow="plannar", **QUICK)
    with pytest.raises(TypeError, match="flow: expected a recipe's name"):
        vf.fit(target, flow=3, **QUICK)
    with pytest.raises(ValueError, match="flow: expected dim 2 and no context, got dim 3"):
        vf.fit(target, flow=vf.recipes.planar(3), **QUICK)


def test_warm_start_from_a_posterior_and_from_values():
    post = vf.fit(mixture(1.0), **QUICK)
    warm = vf.fit(mixture(1.0), init=post, **QUICK)
    assert warm.elbo >= post.elbo - 0.02 and warm.flow_description == post.flow_description
    # a narrow far mode that no start would find, but for the value given
    target = vf.LogDensity(
        lambda x: Normal(5000.0, 0.01).log_prob(x.clamp(4990, 5010)).sum(-1) - x.abs().sum(-1), dim=1
    )
    near = vf.fit(target, init=torch.tensor([5000.2]), **QUICK)
    assert float(near.sample(500, seed=0).mean()) == pytest.approx(5000, abs=0.05)

    def model():
        pyro.sample("s", dist.HalfNormal(2.0))

    s = vf.fit(model, init={"s": torch.tensor(1.5)}, **QUICK).sample(10_000, seed=0)["s"]
    assert float(s.mean()) == pytest.approx(2 * math.sqrt(2 / math.pi), abs=0.05)
    with pytest.raises(ValueError, match="init: expected finite values of shape"):
        vf.fit(mixture(1.0), init=torch.zeros(3), **QUICK)
    with pytest.raises(ValueError, match="init: named values need a Pyro model"):
        vf.fit(mixture(1.0), init={"x": torch.zeros(2)}, **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"stepz": 3},
            TypeError,
            "fit: unknown option 'stepz'; expected flow, seed, progress, steps, .*, or an argument",
        ),
        ({"steps": -1}, ValueError, "steps: expected an integer"),
        ({"steps": 2.5}, ValueError, "steps: expected an integer"),
        ({"particles": 1}, ValueError, "particles: expected an integer of at least 2"),
        ({"lr": 0.0}, ValueError, "lr: expected a positive number"),
        ({"max_seconds": -1}, ValueError, "max_seconds: expected a positive number"),
        ({"num_draws": 5}, ValueError, "num_draws: expected an integer of at least 100"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message) as caught:
        vf.fit(mixture(1.0), progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: -x.square(), "got \\(32, 2\\)"),
        (lambda x: -x.square().sum(-1, keepdim=True), "squeeze"),
        (lambda x: -x.square().sum(), "got \\(\\)"),
        (lambda x: None, "got NoneType"),
        (lambda x: -x.detach().square().sum(-1), "grad"),
        (lambda x: -x.square().sum(-1) + torch.rand(len(x)), "same value for the same x"),
        (lambda x: -x.square().sum(-1) * torch.nan, "got NaN at all 32 points"),
    ],
)
def test_malformed_targets_are_refused_before_locating(fn, message):
    with pytest.raises(ValueError, match=message) as caught:
        vf.fit(vf.LogDensity(fn, dim=2), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.where(x[:, 0] > 0, -x.square().sum(-1), torch.nan),
        lambda x: torch.where(x.abs().amax(-1) < 1, -x.square().sum(-1), -torch.inf),
    ],
)
def test_a_constraint_through_the_mass_is_warned_of_and_refused(fn):
    with (
        pytest.warns(UserWarning, match="beside values that matter.*put the constraint in"),
        pytest.raises(ValueError, match="put the constraint into the target"),
    ):
        vf.fit(vf.LogDensity(fn, dim=2), progress=False)


def test_time_limit_and_no_steps():
    post = vf.fit(mixture(1.0), progress=False, max_seconds=0.5, num_draws=2000, steps=100_000)
    assert "time limit" in " ".join(post.notes) and len(post.trace) < 5000
    assert vf.fit(mixture(1.0), progress=False, steps=0, num_draws=2000).trace == []


def test_interrupt_returns_the_best_so_far():
    def report(step, *_):
        if step == 40:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without one
    try:
        result = train(vf.recipes.spline(2).double(), mixture(1.0), steps=1000, report=report)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.reason == "interrupted at step 40" and len(result.elbo) == 40


def test_training_rolls_back_and_gives_up_after_three(monkeypatch):
    calls = [0]

    def log_prob(x):
        calls[0] += 1
        return -0.5 * x.square().sum(-1) * (math.nan if calls[0] in (70, 90) else 1.0)

    result = train(vf.recipes.gaussian(2).double(), vf.LogDensity(log_prob, dim=2), steps=120, lr=1e-3)
    assert result.rolled_back == 2 and math.isfinite(result.elbo[-1])
    broken = vf.LogDensity(lambda x: x.sum(-1) * math.nan, dim=2)
    with pytest.raises(training.DivergedError, match="for the fourth time"):
        train(vf.recipes.gaussian(2).double(), broken, steps=120)


def test_draws_outside_the_support_raise_with_advice_when_they_are_many():
    target = vf.LogDensity(lambda x: torch.where(x[:, 0] > 1, -x.square().sum(-1), -torch.inf), dim=2)
    with pytest.raises(ValueError, match="put the constraint into the target"):
        train(vf.recipes.gaussian(2).double(), target, steps=200, lr=1e-4)


def test_training_improves_and_stops_when_weights_are_constant():
    law = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    )
    target = vf.LogDensity(law.log_prob, dim=2)
    torch.manual_seed(0)
    result = train(vf.recipes.gaussian(2).double(), target, path=True, steps=2000)
    assert "all but constant" in result.reason and len(result.elbo) < 1000
    with torch.no_grad():
        assert mean_elbo(log_weights(result.flow, target, 2000).log_w) > -1e-3


def heavy(x):
    return -2 * x.abs().sqrt().sum(-1)


def test_training_that_leads_nowhere_is_given_up():
    """Gaussians for 120 coordinates with heavy tails: log-weights vary by 20, and training cannot change it."""
    target, flow = vf.LogDensity(heavy, dim=120), vf.recipes.diagonal(120).double()
    how = {"path": True, "steps": 1000, "lr": 2e-3}
    torch.manual_seed(0)
    result = train(flow, target, give_up=True, **how)
    assert result.given_up and result.reason.startswith("given up") and len(result.elbo) == training.GIVEN_UP_FROM
    result = train(flow, target, give_up=True, max_seconds=1e3, **how | {"steps": 210})
    assert not result.given_up and len(result.elbo) == 210


def test_a_fit_that_was_given_up_is_not_annealed(monkeypatch):
    """In many dimensions: here, as if these two were many, and every fit hopeless."""
    monkeypatch.setattr(fit_module, "LONG", 1)
    for name, value in (("HOPELESS", 0.0), ("GIVEN_UP_FROM", 0)):
        monkeypatch.setattr(training, name, value)
    post = vf.fit(vf.LogDensity(heavy, dim=2), flow="planar", progress=False, lr=1e-4)
    assert any("given up" in note for note in post.notes) and "annealing" not in post.timing


def test_result_survives_json(gaussian):
    assert json.loads(json.dumps(vars(gaussian[3].settings)))["seed"] == 0


YEARS = torch.arange(1990.0, 2011.0)
COUNTS = torch.tensor([13, 11, 9, 18, 14, 13, 17, 19, 15, 16, 21, 18, 20, 28, 21, 26, 29, 22, 33, 28, 31.0])


def poisson_trend(years, counts):
    a, b = pyro.sample("a", dist.Normal(0.0, 100.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("years"):
        pyro.sample("y", dist.Poisson((a + b * years).exp()), obs=counts)


def poisson_density(x):
    eta = x[:, :1] + x[:, 1:] * YEARS.double()
    log_p = (COUNTS.double() * eta - eta.exp() - (COUNTS.double() + 1).lgamma()).sum(-1)
    return log_p + Normal(0.0, 100.0).log_prob(x[:, 0]) + Normal(0.0, 1.0).log_prob(x[:, 1])


@pytest.mark.parametrize("as_model", [True, False])
def test_a_sound_target_that_overflows_in_much_of_the_box_is_fitted_and_claimed(as_model):
    post = (
        vf.fit(poisson_trend, YEARS, COUNTS, **QUICK)
        if as_model
        else vf.fit(vf.LogDensity(poisson_density, dim=2), **QUICK)
    )
    assert post.verdict.status in ("reliable", "corrected")
    # by quadrature over (a + 2000 b, b), whose Jacobian is 1
    level, slope = torch.meshgrid(torch.linspace(2.6, 3.4, 801), torch.linspace(0.0, 0.12, 801), indexing="ij")
    level, slope = level.double(), slope.double()
    grid = torch.stack([level - 2000 * slope, slope], -1).reshape(-1, 2)
    log_p = poisson_density(grid) + math.log(0.8 / 800 * 0.12 / 800)
    assert post.log_evidence == pytest.approx(float(log_p.logsumexp(0)), abs=0.02)
    table = post.summary()
    name = "b" if as_model else "x[1]"
    assert table.loc[name, "mean"] == pytest.approx(
        float(log_p.softmax(0) @ grid[:, 1]), abs=0.05 * table.loc[name, "sd"]
    )
    assert any("of the box of side 4 around 0" in note for note in post.notes)
    assert any("data: 'y' (21 values)" in note for note in post.notes) == as_model


def test_a_target_without_a_value_in_the_box_is_fitted_from_starts_that_have_one():
    law = Normal(torch.tensor([300.0, -40.0]).double(), torch.tensor([1.0, 2.0]).double())

    def fn(x):
        return torch.where(x[:, 0] < 100, torch.nan, law.log_prob(x).sum(-1))

    with pytest.raises(ValueError, match="got NaN at all 32 points"):
        vf.fit(vf.LogDensity(fn, dim=2), **QUICK)
    post = vf.fit(vf.LogDensity(fn, dim=2), init=torch.tensor([299.0, -39.0]), **QUICK)
    assert post.verdict.status == "reliable" and post.log_evidence == pytest.approx(0.0, abs=0.01)

    def model():
        rate = pyro.sample("rate", dist.Normal(1e-3, 1e-4))
        pyro.sample("y", dist.Poisson((1e6 * (rate.exp() - 1)).sqrt()), obs=torch.tensor(30.0))

    post = vf.fit(model, **QUICK)
    assert post.verdict.status == "reliable" and post.summary().loc["rate", "mean"] == pytest.approx(9.8e-4, abs=5e-5)


def test_a_jump_to_finite_garbage_has_no_weight_and_is_named():
    def fn(x):  # far below in log p, arithmetic overflows, and nan_to_num makes numbers of it
        return torch.where(x[:, 0] > 9, 1e307, Normal(0.0, 1.0).log_prob(x).sum(-1))

    post = vf.fit(vf.LogDensity(fn, dim=2), **QUICK)
    assert post.verdict.status != "unreliable" and post.log_evidence == pytest.approx(0.0, abs=0.01)
    named = [note for note in post.notes if "above 4.5e+15 at" in note]
    assert len(named) == 1 and "1e+307 at x = [" in named[0]


@pytest.mark.parametrize("hole", [math.nan, math.inf, 1e307])
def test_no_claim_is_made_beside_a_region_without_values(hole):
    def fn(x):
        return torch.where(x[:, 0] > 1.5, hole, Normal(0.0, 1.0).log_prob(x).sum(-1))

    with pytest.warns(UserWarning, match="counts as no density"):
        post = vf.fit(vf.LogDensity(fn, dim=2, nonfinite="skip"), **QUICK)
    assert post.verdict.status == "unreliable"
    assert any("beside draws that weigh" in reason for reason in post.verdict.reasons)


@pytest.mark.parametrize("double", [False, True])
def test_no_claim_is_made_where_float32_cannot_tell_log_p(double):
    def fn(x):
        log_p = -0.5 * x.float().square().sum(-1) + 1e8
        return log_p.double() if double else log_p

    post = vf.fit(vf.LogDensity(fn, dim=2), **QUICK)
    assert post.verdict.status == "unreliable"
    said = [reason for reason in post.verdict.reasons if "subtract a constant" in reason and "float64" in reason]
    assert len(said) == 1
    for corrected in (post.anneal(100, 4, seed=0, progress=False), post.mcmc("imh", seed=0, progress=False)):
        assert corrected.verdict.status == "unreliable" and said[0] in corrected.verdict.reasons


def test_the_same_constant_in_float64_is_no_obstacle():
    post = vf.fit(vf.LogDensity(lambda x: -0.5 * x.square().sum(-1) + 1e8, dim=2), **QUICK)
    assert post.verdict.status == "reliable"
    assert post.log_evidence - 1e8 == pytest.approx(math.log(2 * math.pi), abs=0.01)


def test_what_was_held_fixed_and_what_was_observed_is_said():
    pyro.clear_param_store()
    torch.manual_seed(0)
    linear = torch.nn.Linear(1, 1)

    def model(y):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        net = pyro.module("net", linear)
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        if y is not None:
            pyro.sample("y", dist.Normal(net(mu.reshape(1)).expand(len(y)), 1.0).to_event(1), obs=y)

    said = " ".join(vf.fit(model, torch.ones(3), **QUICK).notes)
    assert "data: 'y' (3 values)." in said
    assert re.search(r"held fixed, not inferred: scale = 2, net\.weight = -?\d\S*, net\.bias = -?\d", said)
    assert (
        "no data: no site is observed and nothing is a factor: this is the prior." in vf.fit(model, None, **QUICK).notes
    )

    def factor():
        pyro.factor("likelihood", -0.5 * pyro.sample("mu", dist.Normal(0.0, 1.0)).square())

    assert "data: pyro.factor 'likelihood'." in vf.fit(factor, **QUICK).notes


def test_a_target_that_torch_differentiates_once_is_fitted():
    def fn(x):
        apart = torch.cdist(x.unsqueeze(-1), torch.tensor([[0.3], [-0.7]]).double().expand(len(x), 2, 1))
        return -0.5 * apart.square().sum((-1, -2))

    with pytest.raises(NotImplementedError):
        x = torch.zeros(1, 2).double().requires_grad_()
        (gradient,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), x)
    post = vf.fit(vf.LogDensity(fn, dim=2), **QUICK)
    assert post.verdict.status == "reliable"
    assert post.log_evidence == pytest.approx(math.log(math.pi) - 0.5, abs=0.01)  # N(−.2, ½) in each coordinate


def test_a_float32_only_target_is_fitted_and_said():
    weight = torch.eye(2)
    post = vf.fit(vf.LogDensity(lambda x: -(x @ weight).square().sum(-1), dim=2), **QUICK)
    assert any("float32" in note for note in post.notes)
    assert post.log_evidence == pytest.approx(math.log(math.pi), abs=0.02)


def test_a_matrix_routine_that_fails_far_out_costs_only_its_rows():
    def log_prob(x):
        identity = torch.eye(2, dtype=x.dtype)
        tril = torch.linalg.cholesky(identity * (9 - x[:, :1, None]))  # not positive definite from x₀ = 9 on
        return Normal(0.0, 1.0).log_prob(x).sum(-1) + 0 * tril.sum((-1, -2))

    post = vf.fit(vf.LogDensity(log_prob, dim=2), **QUICK)
    assert post.log_evidence == pytest.approx(0.0, abs=0.01)
    assert any("failed at" in note for note in post.notes)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 0.5 * x.square().sum(-1),
        lambda x: x.sum(-1),
        lambda x: -0.5 * x[:, 0] ** 2 + x[:, 1].exp(),
        lambda x: -0.5 * torch.log1p(x.square().sum(-1)),
    ],
)
def test_an_improper_target_ends_and_is_never_called_reliable(fn):
    try:
        post = vf.fit(vf.LogDensity(fn, dim=2), **QUICK)
    except (training.DivergedError, ValueError) as error:
        assert "not finite" in str(error) or "got inf at x" in str(error)
        return
    assert post.verdict.status == "unreliable"
    assert max(map(len, post.describe().splitlines())) < 300


def test_nan_where_no_start_looked_is_named():
    """A density that is NaN in a half-space beyond the points checked first."""
    target = vf.LogDensity(lambda x: torch.where(x[:, 0] > 2.5, torch.nan, -0.5 * x.square().sum(-1)), dim=2)
    with pytest.raises(ValueError, match="log_prob: expected finite values or -inf, got nan at x = "):
        vf.fit(target, **QUICK)


def test_a_target_of_ones_own():
    class Ball(vf.Target):
        dim = 2

        def log_prob(self, x):
            return -0.5 * x.square().sum(-1)

        def constrain(self, x):
            return {"radius": x.norm(dim=-1)}

    post = vf.fit(Ball(), **QUICK)
    assert post.verdict.status == "reliable" and list(post.summary().index) == ["radius"]
    assert post.summary().loc["radius", "mean"] == pytest.approx(math.sqrt(math.pi / 2), abs=0.02)


def test_the_limit_of_time_covers_all_stages():
    """A density of 20 ms a call: locating is cut short, and nothing claimed; a quick one is claimed in its time."""

    def slow(x):
        time.sleep(0.02)
        return -0.5 * x.square().sum(-1)

    began = time.monotonic()
    post = vf.fit(vf.LogDensity(slow, dim=3), progress=False, max_seconds=3)
    assert time.monotonic() - began < 9
    assert post.verdict.status == "unreliable" and "max_seconds" in post.verdict.reasons[1]
    assert "time" in {check.name for check in post.verdict.checks if not check.passed}
    quick = vf.fit(mixture(0.0), progress=False, max_seconds=60)
    assert quick.verdict.status == "reliable"


def test_the_clock():
    clock = Clock(10.0)
    clock.began -= 5
    assert clock.left() == pytest.approx(5, abs=0.1) and clock.left(0.8, 3) == pytest.approx(1, abs=0.1)
    assert clock.left(0.1) == 0 and Clock(None).left() is None
    assert [clock.training_share(s) for s in (0.0, 2.0, 9.0)] == pytest.approx([0.8, 0.7, 0.5])
    for share, cut in ((0.4, ["locating"]), (0.9, [])):
        clock.cut = []
        with clock.ending("locating", share):
            assert late() == bool(cut)
        assert clock.cut == cut and not late()
    clock.laps = {"locating": 2.0, "training": 40.0}
    assert clock.for_annealing() == pytest.approx(5, abs=0.1)
    clock.limit = None
    assert clock.for_annealing() == 42 and Clock(None).for_annealing() == FLOOR


def test_what_is_to_come_is_shown(capsys):
    vf.fit(mixture(0.0), steps=20, particles=64, num_draws=500)
    assert "to come: training at most" in capsys.readouterr().err


def in_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("towns", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_a_file_loses_nothing(tmp_path):
    """What was skipped, the trace to its last digit, data and dimensions without the model; and the umask's mode."""
    y = torch.tensor([0.5, 1.5, -1.0])
    post = vf.fit(in_plate, y, flow="planar", **QUICK)
    post = dataclasses.replace(post, skipped=3)
    before = os.umask(0o027)
    try:
        path = post.save(tmp_path / "posterior.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    alone = vf.load(path)
    assert type(alone) is vf.Posterior and alone.skipped == 3 and alone.trace == post.trace
    assert alone.settings == post.settings and [str(o) for o in alone.modes.origin] == [
        str(o) for o in post.modes.origin
    ]
    data, again = post.to_arviz(num_draws=50), alone.to_arviz(num_draws=50)
    assert again.posterior["theta"].dims == data.posterior["theta"].dims == ("chain", "draw", "towns")
    assert torch.equal(torch.as_tensor(again.observed_data["y"].values), y.double())
    resaved = vf.load(alone.save(tmp_path / "again.safetensors"))
    assert resaved.to_arviz(num_draws=50).posterior["theta"].dims == data.posterior["theta"].dims


def test_draws_are_those_to_use(gaussian):
    post = gaussian[3]
    assert post.draws.shape == post.flow_draws.shape and torch.equal(post.draws, post.sample(10_000, seed=0))
    annealed = post.anneal(particles=100, replicates=4, progress=False)
    assert torch.equal(annealed.flow_draws, post.flow_draws) and not torch.equal(annealed.draws, post.draws)
    assert torch.isin(annealed.draws, annealed.proposal.x).all()
    assert post != annealed and post == post  # by identity: tensors are not compared


def test_signature_says_what_can_be_asked():
    options = inspect.signature(vf.fit).parameters
    assert {"steps", "particles", "lr", "max_seconds", "num_draws", "init", "reparam", "rehearse"} <= set(options)
    assert options["steps"].default == 1500 and options["max_seconds"].default is None
    for field in dataclasses.fields(Options):
        assert options[field.name].default == field.default, field.name
