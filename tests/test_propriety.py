"""Directions in which a target cannot be normalised are named, and only these."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.inference.propriety import improper, slow_rays

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
