"""Directions in which a target cannot be normalised are named, and only these."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.inference.estimate.weights import Weights
from vi_flows.inference.judge.proposal import DefensiveProposal
from vi_flows.inference.judge.propriety import combination, improper, slow_combinations, slow_rays
from vi_flows.inference.start import starts
from vi_flows.running import seeded

IMPROPER = {
    "rises": (lambda x: -0.5 * x[:, 0] ** 2 + 0.1 * x[:, 1], {"+x[1]"}),
    "rises and falls": (lambda x: -0.5 * x[:, 0] ** 2 + x[:, 1] ** 3 / 10, {"+x[1]"}),
    "1/distance": (lambda x: -0.5 * x[:, 0] ** 2 - torch.log1p(x[:, 1].abs()), {"+x[1]", "−x[1]"}),
    "flat far out": (
        lambda x: torch.logaddexp(-0.5 * x.square().sum(-1), -30 - 0.5 * x[:, 0] ** 2),
        {"+x[1]", "−x[1]"},
    ),
}
PROPER = {
    "normal": lambda x: -0.5 * x.square().sum(-1),
    "far and narrow": lambda x: -0.5 * ((x - 1e4) / 1e-2).square().sum(-1),
    "wide": lambda x: -0.5 * (x / 1e6).square().sum(-1),
    "Cauchy": lambda x: -torch.log1p(x.square()).sum(-1),
    "Laplace": lambda x: -x.abs().sum(-1),
    "half-spaces": lambda x: torch.where(x[:, 0] > 0, -x.square().sum(-1), -torch.inf),
}


@pytest.mark.parametrize("case", IMPROPER)
def test_the_directions_of_an_improper_target(case):
    log_p, expected = IMPROPER[case]
    assert {name for name, _ in slow_rays(vf.LogDensity(log_p, dim=2))} == expected


@pytest.mark.parametrize("case", PROPER)
def test_a_proper_target_has_none(case):
    assert slow_rays(vf.LogDensity(PROPER[case], dim=2)) == []


def test_the_catalogue_is_proper():
    known = [vf.catalogue.get(name) for name in vf.catalogue.names() if not vf.catalogue.needs_data(name)]
    assert [slow_rays(target) for target in known] == [[]] * len(known)


def test_an_unbounded_hierarchy_is_proper_and_a_flat_prior_is_named():
    y = torch.tensor([2.0, -1.0, 0.5])

    def centred(y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def unidentified(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(b + torch.tanh(a), 1.0), obs=y)

    assert improper(vf.PyroModel(centred, y)) == ""
    target = vf.PyroModel(unidentified, y)
    assert {name for name, _ in slow_rays(target)} == {"+a", "−a"}
    assert "falls no faster than 1/distance along" in improper(target)


def test_a_fit_of_an_improper_target_says_where():
    target = vf.LogDensity(lambda x: -0.5 * x[:, 0] ** 2 - torch.log1p(x[:, 1].abs()), dim=2)
    posterior = vf.fit(target, steps=100, num_draws=500, progress=False)
    assert posterior.verdict.status == "unreliable" and math.isfinite(posterior.elbo)
    assert "x[1]: the target looks improper" in posterior.verdict.reasons[1]


def drawn(target, flow="gaussian"):
    """Weighted draws of the proposal around a located Gaussian, and its modes."""
    with seeded(0):
        found = starts(target, flow, None, None)
        proposal = DefensiveProposal(found.flows[-1].flow.requires_grad_(False), found.modes)
        x, log_m, _, _ = proposal.draw(20_000)
    return Weights(x, log_m, target.log_prob(x)), proposal.modes


def springs(x):
    """Five particles in the plane, held by springs of length 1 between all pairs: no one holds their centre."""
    i, j = torch.triu_indices(5, 5, 1)
    place = x.reshape(-1, 5, 2)
    apart = ((place[:, i] - place[:, j]).square().sum(-1) + 1e-12).sqrt()
    return 2 * (apart - 1).square().sum(-1)


def test_flat_combinations_are_named():
    """log p that does not change along v, whatever the scales of the coordinates."""
    v = torch.tensor([3.0, 0.0, -4.0, 0.0]).double()
    basis = torch.linalg.qr(torch.cat([v[:, None] / 5, torch.randn(4, 3).double()], 1))[0][:, 1:]
    target = vf.LogDensity(lambda x: -0.5 * (x @ basis * torch.tensor([1.0, 10.0, 1e3])).square().sum(-1), dim=4)
    found = slow_combinations(target, *drawn(target))
    assert [name for name, _ in found] == ["0.80 x[2] − 0.60 x[0]"]
    assert abs(found[0][1]) < 1e-3


def test_an_energy_without_a_place_is_improper_along_both_axes():
    target = vf.Energy(springs, dim=10)
    posterior = vf.fit(target, flow="gaussian", steps=50, num_draws=500, progress=False)
    assert posterior.verdict.status == "unreliable" and "annealing" not in posterior.timing
    said = posterior.verdict.reasons[1]
    assert "0.45 x[0] + 0.45 x[2] + 0.45 x[4] + 0.45 x[6] + ..." in said and "0.45 x[1] + 0.45 x[3]" in said
    assert "the target looks improper there" in said
    assert "improper" in {check.name for check in posterior.verdict.checks if not check.passed}


def test_separated_data_under_flat_priors_are_improper():
    x = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.5, 0.6], [-1.1, -0.2], [0.8, 0.9], [-0.4, -0.7]])
    y = (x[:, 0] > 0).float()

    def model():
        with pyro.plate("k", 2):
            b = pyro.sample("b", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("n", 6):
            pyro.sample("y", dist.Bernoulli(logits=x.to(b.dtype) @ b), obs=y.to(b.dtype))

    target = vf.PyroModel(model)
    assert slow_rays(target) == [] or "b[0]" in slow_rays(target)[0][0]
    assert "b[0]" in improper(target, *drawn(target))


@pytest.mark.parametrize("df", [0.3, 1.0, 4.0])
def test_heavy_tails_are_proper_along_combinations_too(df):
    law, mixing = torch.distributions.StudentT(df), torch.randn(4, 4).double() * torch.logspace(-2, 2, 4).double()
    target = vf.LogDensity(lambda x: law.log_prob(x @ mixing).sum(-1), dim=4)
    assert slow_combinations(target, *drawn(target)) == []


def test_a_combination_in_words():
    names = ["mu", "a[0]", "a[1]", "a[2]", "a[3]"]
    step = torch.tensor([0.5, -0.5, -0.5, 0.01, -0.5]).double()
    assert combination(step, names) == "0.50 mu − 0.50 a[0] − 0.50 a[1] − 0.50 a[3]"
    assert combination(-step, names) == "−0.50 mu + 0.50 a[0] + 0.50 a[1] + 0.50 a[3]"
    assert combination(torch.ones(5).double() / 5**0.5, names).endswith("0.45 a[2] + ...")
