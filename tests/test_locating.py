"""Locating: optima, curvature and Gaussian VI on targets with known answers."""

from __future__ import annotations

import math

import pytest
import torch

import vi_flows as vf
from vi_flows.inference.estimate.evaluate import hessians
from vi_flows.inference.estimate.weights import effective_sample_size, log_mean
from vi_flows.inference.judge.proposal import DefensiveProposal
from vi_flows.inference.locate.ascent import bfgs_paths, newton
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin, gaussian_vi, improved
from vi_flows.inference.locate.locate import locate
from vi_flows.inference.locate.points import start_points
from vi_flows.testing.synthetic import synthetic

Normal = torch.distributions.Normal


def correlated(dim: int, seed: int = 0) -> tuple[vf.LogDensity, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    factor = torch.randn(dim, dim).double() + 2 * torch.eye(dim).double()
    mean = 10 * torch.randn(dim).double()
    covariance = factor @ factor.mT
    law = torch.distributions.MultivariateNormal(mean, covariance)
    return vf.LogDensity(law.log_prob, dim=dim), mean, covariance


def test_hessians_are_exact():
    target, _, covariance = correlated(4)
    x = torch.randn(3, 4).double()
    exact = -torch.linalg.inv(covariance).expand(3, 4, 4)
    assert torch.allclose(hessians(target, x, torch.ones_like(x)), exact, rtol=1e-9, atol=1e-10)


def test_hessians_that_autograd_cannot_give_are_differenced():
    def log_prob(x):  # torch's logaddexp has second derivatives of NaN where its arguments are far apart
        left, right = Normal(-40.0, 1.0).log_prob(x).sum(-1), Normal(40.0, 2.0).log_prob(x).sum(-1)
        return torch.logaddexp(left, right)

    x = torch.tensor([[40.0, 40.0], [-40.0, -40.0]]).double()
    found = hessians(vf.LogDensity(log_prob, dim=2), x, torch.ones_like(x))
    expected = torch.diag_embed(torch.tensor([[-0.25, -0.25], [-1.0, -1.0]]).double())
    assert torch.allclose(found, expected, atol=1e-6)


class Once(torch.autograd.Function):
    """x⁴/12 with a derivative that torch cannot differentiate again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4 / 12

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0] ** 3 / 3


def test_hessians_of_a_target_that_torch_differentiates_once_are_differenced():
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double()
    for prior in (0.0, 0.5):  # beside it, what autograd can differentiate twice
        target = vf.LogDensity(lambda x, prior=prior: -Once.apply(x).sum(-1) - prior * x.square().sum(-1), dim=2)
        expected = torch.diag_embed(-x.square() - 2 * prior)
        assert torch.allclose(hessians(target, x, torch.ones_like(x)), expected, atol=1e-5)

    def distances(x):
        return -0.5 * torch.cdist(x[:, :, None], torch.zeros(len(x), 1, 1).to(x)).square().sum((-1, -2))

    found = hessians(vf.LogDensity(distances, dim=2), x, torch.ones_like(x))
    assert torch.allclose(found, -torch.eye(2).double().expand(2, 2, 2), atol=1e-6)


def test_bfgs_and_newton_reach_the_optimum():
    rosenbrock = vf.LogDensity(lambda x: -((1 - x[:, 0]) ** 2) - 100 * (x[:, 1] - x[:, 0] ** 2) ** 2, dim=2)
    torch.manual_seed(0)
    ends, record = bfgs_paths(rosenbrock, 4 * torch.rand(16, 2).double() - 2)
    assert len(record.x) > 16
    x, value, _ = newton(rosenbrock, ends[ends.value.argsort(descending=True)[:4]])
    assert torch.allclose(x, torch.ones_like(x), atol=2e-3)
    assert float(value.min()) > -2e-6


@pytest.mark.parametrize("dim", [1, 3, 10, 40])
def test_gaussians_are_found_exactly(dim):
    target, _, covariance = correlated(dim)
    torch.manual_seed(1)
    located = locate(target, start_points(target))
    assert located.elbo == pytest.approx(0.0, abs=1e-3)
    found = located.best.scale_tril[0] @ located.best.scale_tril[0].mT
    assert torch.allclose(found, covariance, rtol=0.02, atol=0.02 * float(covariance.diagonal().max()))
    assert len(located.optima) == 1


def test_bad_scaling():
    """Scales of 1e6 and 1e-3 side by side, far from the starts."""
    scale = torch.tensor([1e6, 1e-3, 1.0]).double()
    mean = torch.tensor([3e6, 5.0, -3.0]).double()
    target = vf.LogDensity(lambda x: Normal(mean, scale).log_prob(x).sum(-1), dim=3)
    torch.manual_seed(0)
    located = locate(target, start_points(target))
    assert located.elbo == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 2, 8, 20])
def test_two_modes_are_seen_and_the_heavier_wins(dim):
    def log_prob(x):
        far = Normal(8.0, 1.0).log_prob(x).sum(-1) + math.log(0.1)
        return torch.logaddexp(far, Normal(-8.0, 1.0).log_prob(x).sum(-1) + math.log(0.9))

    target = vf.LogDensity(log_prob, dim=dim)
    torch.manual_seed(0)
    located = locate(target, start_points(target))
    assert len(located.optima) == 2 and len(located.modes) >= 2
    assert located.elbo == pytest.approx(math.log(0.9), abs=0.01)
    assert located.best.loc[0].tolist() == pytest.approx([-8] * dim, abs=0.2)


def test_gaussian_vi_reaches_the_best_gaussian():
    """For x₂ | x₁ ~ N(0, e^{x₁}), x₁ ~ N(0, 1) the best diagonal Gaussian is known by a search over two numbers."""
    target = vf.LogDensity(
        lambda x: Normal(0.0, 1.0).log_prob(x[:, 0]) + Normal(0.0, (x[:, 0] / 2).exp()).log_prob(x[:, 1]), dim=2
    )

    # q = N((m, 0), diag(s², t²)): ELBO = −½(m² + s²) − ½m − ½t² e^{−m + s²/2} + log st + 1, best at t² = e^{m − s²/2}
    def bound(m, s):
        return -0.5 * (m * m + s * s) - 0.5 * m + math.log(s) + 0.5 * (m - s * s / 2) + 0.5

    best = max(bound(m / 200, s / 200) for m in range(-200, 200) for s in range(1, 400))
    torch.manual_seed(0)
    start = Gaussians(torch.zeros(1, 2).double() + 1, 0.3 * torch.eye(2).double()[None], (Origin(Kind.END),))
    found = gaussian_vi(target, start, iterations=100)
    elbo = float(found.elbo(target, torch.randn(50_000, 2).double()))
    assert elbo == pytest.approx(best, abs=0.02)


def test_starts_hold_the_given_points_and_prior_draws():
    target = vf.LogDensity(lambda x: -x.square().sum(-1), dim=2)
    extra = torch.tensor([[5.0, 6.0]]).double()
    points = start_points(target, extra)
    assert points.dtype == torch.float64 and len(points) == 64
    assert torch.equal(points[0], extra[0])
    assert float(points.abs().max()) > 20


def test_further_starts_find_modes_beyond_the_first_ones():
    centres = torch.cartesian_prod(*[torch.tensor([-30.0, -10.0, 10.0, 30.0], dtype=torch.float64)] * 2)

    def log_p(x):
        return (-0.5 * (x[:, None] - centres).square().sum(-1)).logsumexp(-1)

    target = vf.LogDensity(log_p, dim=2)
    located = locate(target, start_points(target))
    apart = torch.cdist(centres, located.modes.loc).amin(1)
    assert int((apart < 0.1).sum()) == 16 and len(located.optima) >= 16


def test_the_proposal_adapts_to_modes_that_the_flow_misses():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]], dtype=torch.float64)

    def log_p(x):
        return (weights.log() - 0.5 * (x[:, None] - centres).square().sum(-1)).logsumexp(-1)

    target = vf.LogDensity(log_p, dim=2)
    flow = vf.recipes.gaussian(2).double()  # about the standard normal: the first mode alone
    eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    proposal = DefensiveProposal(flow, Gaussians(centres, eye, (Origin(Kind.END),) * 3))
    x, log_m, _, _ = proposal.draw(20_000)
    better = proposal.adapted(x, log_m, target.log_prob(x) - log_m)
    assert better.shares[2] == pytest.approx(0.8, abs=0.02)  # what the flow cannot reach, at most 0.8
    mass = (better.components.weights - 0.2 / 3) / 0.8
    assert mass[1:].tolist() == pytest.approx((weights[1:] / (better.shares[2] + 0.02)).tolist(), abs=0.05)
    before, after = (q.draw(20_000) for q in (proposal, better))
    ess = [effective_sample_size(target.log_prob(d[0]) - d[1]) for d in (before, after)]
    assert ess[1] > 3 * ess[0]
    assert log_mean(target.log_prob(after[0]) - after[1]) == pytest.approx(math.log(2 * math.pi), abs=0.02)
    near = DefensiveProposal(flow, Gaussians(centres[:1], eye[:1], (Origin(Kind.END),)))
    x, log_m, _, _ = near.draw(4000)
    assert near.adapted(x, log_m, -0.5 * x.square().sum(-1) - log_m) is None


def test_modes_where_paths_end_early_are_found():
    """Scales of .001 to 4 and a bend: BFGS stops short, with curvatures far too large, and Newton steps go on."""
    target = synthetic("mixture", 62)  # four modes of a quarter each
    torch.manual_seed(0)
    located = locate(target, start_points(target))
    latent = target.law.bijection.inverse_and_logdet(located.optima.loc)[0]
    assert torch.cdist(latent, target.flow.base.components()[0].double()).argmin(1).unique().numel() == 4
    assert located.mixture.weights.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_a_start_gives_way_to_its_gaussian_vi_only_where_that_is_better():
    target = vf.LogDensity(lambda x: Normal(0.0, 1.0).log_prob(x).sum(-1), dim=2)
    loc = torch.tensor([[0.0, 0.0], [0.5, 0.5]]).double()
    tril = torch.tensor([1.05, 0.1]).double()[:, None, None] * torch.eye(2).double()
    torch.manual_seed(0)
    found, elbo = improved(target, Gaussians(loc, tril, (Origin(Kind.LAPLACE), Origin(Kind.END))))
    assert torch.equal(found.scale_tril[0], tril[0]) and torch.equal(found.loc[0], loc[0])
    assert tuple(map(str, found.origin)) == ("Laplace", "Gaussian VI from the end of a path")
    assert elbo.tolist() == pytest.approx([0.0, 0.0], abs=0.02)
    assert found.scale_tril[1].diagonal().tolist() == pytest.approx([1.0, 1.0], abs=0.1)
