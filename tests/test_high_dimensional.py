"""Hundreds of dimensions and more: locating by L-BFGS and averaged curvature, and fits, against closed forms."""

import math

import pytest
import torch

import vi_flows as vf
from vi_flows.flows.bases import Mixture
from vi_flows.inference.estimate.quantities import estimate
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin, spread_of
from vi_flows.inference.locate.large import (
    MEMORY,
    LbfgsPaths,
    curvature_vi,
    lbfgs_paths,
    locate_large,
    newton_laplace,
    travel,
    whitened_curvature,
)
from vi_flows.inference.locate.points import DENSE_DIMS, start_points


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def low_rank_gaussian(dim: int, rank: int = 8) -> tuple[vf.LogDensity, torch.Tensor, torch.Tensor, float]:
    """N(loc, D (I + U Uᵀ) D) with scales D of 1e-3 to 1e3, unnormalised: the target, loc, sds and log Z."""
    scale = 10 ** (6 * torch.rand(dim, dtype=torch.float64) - 3)
    u = torch.randn(dim, rank, dtype=torch.float64)
    loc = scale * torch.randn(dim, dtype=torch.float64)
    inner = torch.eye(rank).double() + u.mT @ u

    def log_prob(x):
        e = (x - loc) / scale
        along = e @ u
        return -0.5 * (e.square().sum(-1) - (along * torch.linalg.solve(inner, along.mT).mT).sum(-1))

    log_z = 0.5 * dim * math.log(2 * math.pi) + scale.log().sum() + 0.5 * torch.logdet(inner)
    return vf.LogDensity(log_prob, dim), loc, scale * (1 + u.square().sum(-1)).sqrt(), float(log_z)


def chain(dim: int, phi: float = 0.9) -> tuple[vf.LogDensity, torch.Tensor]:
    """A stationary AR(1) chain of unit variances, unnormalised, and its covariance φ^|i−j|."""

    def log_prob(x):
        return -0.5 * (x[:, 0].square() + (x[:, 1:] - phi * x[:, :-1]).square().sum(-1) / (1 - phi**2))

    at = torch.arange(dim, dtype=torch.float64)
    return vf.LogDensity(log_prob, dim), phi ** (at[:, None] - at).abs()


def test_the_direction_is_that_of_the_dense_inverse_hessian():
    """H g by the two-loop recursion, and H of the compact form, against dense BFGS updates of diag."""
    n, dim = 5, 9
    s = torch.randn(1, n, dim, dtype=torch.float64)
    root = torch.randn(dim, dim, dtype=torch.float64)
    y = s @ (root @ root.mT + torch.eye(dim))
    rho = 1 / (s * y).sum(-1)
    diagonal = torch.rand(1, dim, dtype=torch.float64) + 0.5
    x, grad = torch.randn(2, 1, dim, dtype=torch.float64)
    dense, eye = torch.diag(diagonal[0]), torch.eye(dim).double()
    for k in range(n):
        left = eye - rho[0, k] * torch.outer(s[0, k], y[0, k])
        dense = left @ dense @ left.mT + rho[0, k] * torch.outer(s[0, k], s[0, k])
    paths = LbfgsPaths(x, x.sum(-1), grad, diagonal, s, y, rho)
    torch.testing.assert_close(paths.direction()[0], dense @ grad[0])
    found = paths.gaussian(0)
    tril = found.dense("").scale_tril[0]
    torch.testing.assert_close(tril @ tril.mT, dense)
    torch.testing.assert_close(found.loc, x[0] + dense @ grad[0])
    moved = found.at(eye) - found.loc  # rows are the columns of the factor
    torch.testing.assert_close(moved.mT @ moved, dense)
    logdet = found.sd.log().sum() + found.stretch.log1p().sum()
    torch.testing.assert_close(logdet, torch.logdet(dense) / 2)


def test_lbfgs_climbs_to_the_optimum_of_a_chain():
    target, _ = chain(400)
    ends, found = lbfgs_paths(target, 5 * torch.randn(6, 400, dtype=torch.float64), tolerance=1e-8)
    assert ends.value[0] > -1e-6 and ends.s.shape[1] == MEMORY
    assert found and all(g.stretch.min() > -1 for g in found)


def test_curvature_and_laplace_are_exact_for_a_gaussian():
    dim = 320
    target, covariance = chain(dim)
    tril = torch.linalg.cholesky(covariance)
    x = torch.randn(2, dim, dtype=torch.float64)
    torch.testing.assert_close(whitened_curvature(target, x, tril), torch.eye(dim).double(), atol=1e-6, rtol=0)
    start = Gaussians(x[:1], 3 * torch.eye(dim).double()[None], (Origin(Kind.END),))
    found = newton_laplace(target, start)
    torch.testing.assert_close(found.loc[0], torch.zeros(dim).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scale_tril[0] @ found.scale_tril[0].mT, covariance, atol=1e-5, rtol=0)


def test_an_unbounded_density_has_no_laplace_approximation():
    saddle = vf.LogDensity(lambda x: -0.5 * x[:, 1:].square().sum(-1) + 0.05 * x[:, 0].square(), 4)
    start = Gaussians(torch.ones(1, 4).double(), torch.eye(4).double()[None], (Origin(Kind.END),))
    assert len(newton_laplace(saddle, start)) == 0


def test_gaussian_vi_solves_its_two_equations():
    """log p = Σ a x − e^x, of Poisson counts a: m + s²/2 = log a and s⁻² = a; the optimum is at log a."""
    counts = torch.linspace(5, 20, 310, dtype=torch.float64)
    target = vf.LogDensity(lambda x: (counts * x - x.exp()).sum(-1), 310)
    standard = Gaussians(torch.zeros(1, 310).double(), torch.eye(310).double()[None], (Origin(Kind.END),))
    found = curvature_vi(target, travel(target, standard)[0])
    ratio = found.scale_tril[0].square().sum(-1) * counts
    assert abs(ratio.mean() - 1) < 0.02 and (ratio - 1).abs().max() < 0.25
    off = (found.loc[0] - counts.log() + 1 / (2 * counts)) * counts.sqrt()  # in sds; Laplace is off by up to .22
    assert abs(off.mean()) < 0.01 and off.abs().max() < 0.1


def hierarchy(dim: int) -> tuple[vf.LogDensity, float]:
    """A non-centred hierarchy with (log τ, z), y ~ N(τ z, ½²) at τ = .7: the target, and log Z by quadrature."""
    y = 0.86 * torch.randn(dim - 1, dtype=torch.float64)

    def log_prob(x):
        tau = x[:, :1].exp()
        normals = -0.5 * x[:, 1:].square() - 0.5 * ((y - tau * x[:, 1:]) / 0.5).square()
        return (normals - math.log(2 * math.pi * 0.5)).sum(-1) - tau[:, 0].square() / 8 + x[:, 0]

    log_tau = torch.linspace(-6, 2, 4001, dtype=torch.float64)
    variance = (2 * log_tau).exp() + 0.25
    rest = -0.5 * y.square().sum() / variance - 0.5 * (dim - 1) * (2 * math.pi * variance).log()
    each = rest - (2 * log_tau).exp() / 8 + log_tau + math.log(8 / 4000)
    return vf.LogDensity(log_prob, dim), float(each.logsumexp(0))


def test_a_hierarchy_whose_optimum_is_far_from_its_mass():
    """The optimum is at τ of about 6, with all z near 0, hundreds of nats of mass below the best Gaussian."""
    target, log_z = hierarchy(DENSE_DIMS + 1)
    found, optima = locate_large(target, start_points(target))
    epsilon = torch.randn(1000, target.dim, dtype=torch.float64)
    assert optima.loc[0, 0].exp() > 3
    assert float(optima.elbo(target, epsilon)[0]) < log_z - 100
    assert log_z - 1 < float(found.elbo(target, epsilon).max()) < log_z + 0.1


def test_many_draws_of_few_large_components():
    """Draws of a mixture need no factor for each: their moments, and their density against torch's."""
    tril = torch.linalg.cholesky(chain(200)[1])
    mixture = Mixture(torch.zeros(1, 200).double(), tril[None], df=None, fixed=True)
    x = mixture.transform(mixture.noise((5000,)))
    assert not list(mixture.parameters())
    normal = torch.distributions.MultivariateNormal(torch.zeros(200).double(), scale_tril=tril)
    torch.testing.assert_close(mixture.log_prob(x), normal.log_prob(x))
    assert (x.var(0) - 1).abs().max() < 0.1


def test_estimates_are_the_same_in_blocks():
    theta, log_w = torch.randn(500, 230, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    every, last = estimate(theta, log_w), estimate(theta[:, 210:], log_w)
    for name, value in vars(last).items():
        torch.testing.assert_close(getattr(every, name)[..., 210:], value)


def test_few_draws_give_no_correlations():
    z = torch.randn(100, 60, dtype=torch.float64)
    torch.testing.assert_close(spread_of(z).scale_tril[0], torch.diag(z.std(0)))
    assert spread_of(z[:, :10]).scale_tril[0].tril(-1).abs().max() > 0


def test_a_badly_scaled_gaussian_of_500_dimensions():
    target, loc, sd, log_z = low_rank_gaussian(500)
    posterior = vf.fit(target, progress=False)
    assert posterior.verdict.status == "reliable"
    assert abs(posterior.log_evidence - log_z) < 0.01
    x = posterior.sample(20_000)
    assert ((x.mean(0) - loc).abs() / sd).max() < 0.04
    assert (x.std(0) / sd - 1).abs().max() < 0.03


@pytest.mark.slow
def test_a_chain_of_2000_dimensions():
    target, _ = chain(2000)
    posterior = vf.fit(target, progress=False)
    exact = 1000 * math.log(2 * math.pi) + 999.5 * math.log(1 - 0.81)
    assert posterior.verdict.status == "reliable"
    assert abs(posterior.log_evidence - exact) < 0.01
    x = posterior.sample(10_000)
    assert (x.var(0) - 1).abs().max() < 0.07
    assert ((x[:, 1:] * x[:, :-1]).mean(0) - 0.9).abs().max() < 0.07
