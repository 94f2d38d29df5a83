"""Several modes: the mixture that adapts to them, starts that find them, and whole fits."""

import math

import pytest
import torch

import vi_flows as vf
from vi_flows.flows.bases import Mixture, StandardNormal
from vi_flows.inference.estimate.weights import effective_sample_size, log_mean
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin, gaussian_vi, scale_of
from vi_flows.inference.locate.locate import _mixture, locate
from vi_flows.inference.locate.mixture import POOR_ROUNDS, ROUND_DRAWS, adapt_mixture, log_weights_of, whitened
from vi_flows.inference.locate.points import start_points
from vi_flows.targets import LogDensity, catalogue


def gaussians(loc, sd):
    loc = torch.as_tensor(loc, dtype=torch.float64)
    return Gaussians(
        loc, sd * torch.eye(loc.shape[1]).double().expand(len(loc), -1, -1), (Origin(Kind.END),) * len(loc)
    )


def some_mixture(dim=3):
    """Three components with shares .6, .3, .1, of covariances that differ, some ten sds apart."""
    torch.manual_seed(1)
    tril = torch.randn(3, dim, dim).double().tril(-1) / 2 + torch.diag_embed(0.5 + torch.rand(3, dim).double())
    return Mixture(6 * torch.randn(3, dim).double(), tril, torch.tensor([0.6, 0.3, 0.1]), fixed=True)


def test_a_mixture_is_recovered_from_poor_starts():
    """Weights, locations and covariances of a mixture, from round starts a third as wide and off by an sd."""
    truth = some_mixture()
    start = gaussians(truth.loc + 0.5, 0.3)
    found = adapt_mixture(LogDensity(truth.log_prob, 3), start, torch.zeros(3).double())
    log_w = log_weights_of(LogDensity(truth.log_prob, 3), found, 20_000)
    assert effective_sample_size(log_w) > 0.95 * len(log_w)
    assert log_mean(log_w) == pytest.approx(0, abs=0.01)
    near = torch.cdist(found.loc, truth.loc).argmin(1)
    shares = torch.zeros(3).double().index_add(0, near, found.weights)
    assert shares.tolist() == pytest.approx(truth.weights.tolist(), abs=0.02)


def test_components_are_born_where_none_started():
    """A ring: two starts on it, and in the end all of it is covered."""
    ring = LogDensity(lambda x: -0.5 * ((torch.linalg.vector_norm(x, dim=-1) - 4) / 0.3) ** 2, 2)
    torch.manual_seed(0)
    found = adapt_mixture(ring, gaussians([[4.0, 0.0], [-4.0, 0.0]], 0.3), torch.zeros(2).double())
    log_w = log_weights_of(ring, found, 20_000)
    assert len(found.weights) > 8
    assert effective_sample_size(log_w) > 0.85 * len(log_w)
    # ∫ exp(−½((r − 4)/.3)²) r dr dφ = 2π · 4 · .3 √(2π), but for a tail beyond 13 sds
    assert log_mean(log_w) == pytest.approx(math.log(2 * math.pi * 4 * 0.3 * math.sqrt(2 * math.pi)), abs=0.02)


def test_adapting_ends_where_next_to_no_draw_counts():
    """Cauchys of 40 dimensions, whose weighted draws are a handful: no further rounds, and no births in them."""
    rows = []

    def cauchy(x):
        rows.append(len(x))
        return -x.square().log1p().sum(-1)

    torch.manual_seed(0)
    adapt_mixture(LogDensity(cauchy, 40), gaussians(torch.zeros(2, 40), 1.0), torch.zeros(2).double())
    assert sum(rows) <= POOR_ROUNDS * 2 * ROUND_DRAWS


def test_optima_without_mass_make_no_mixture():
    """Spikes, of whose Gaussians no draw is where p is: there is nothing to adapt, nor of one that is left."""
    target = LogDensity(lambda x: -0.5 * x.square().sum(-1), 1)
    optima = gaussians([[3.0], [-3.0]], 1.0)
    for mass in (-math.inf, math.nan, 0.0):
        masses = torch.tensor([-math.inf, mass]).double()
        assert _mixture(target, optima, masses, 0.0)[0] is None


def test_whitened():
    """Mean 0, covariance I, and the same law through the affine layer."""
    mixture = some_mixture()
    base, layer = whitened(mixture)
    z = base.transform(base.noise((400_000,))).detach()
    assert z.mean(0).abs().max() < 0.01
    assert (torch.cov(z.mT) - torch.eye(3)).abs().max() < 0.01
    x, logdet = layer().forward_and_logdet(z[:100])
    assert torch.allclose(base.log_prob(z[:100]).detach() - logdet, mixture.log_prob(x), atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_a_mode_far_beyond_the_others_is_found(seed):
    """Five modes between −700 and 7000, of sd 300, one of them seven spreads of the others away; a fifth each."""
    loc = torch.tensor([[7000.0, 0.0], [1400.0, 0.0], [-700.0, 0.1], [500.0, 0.4], [100.0, -0.4]]).double()
    truth = Mixture(loc, torch.tensor([300.0, 0.05]), fixed=True)
    target = LogDensity(truth.log_prob, 2)
    torch.manual_seed(seed)
    located = locate(target, start_points(target))
    assert float((located.modes.loc - loc[0]).abs()[:, 0].min()) < 30
    log_w = log_weights_of(target, located.mixture)
    assert log_mean(log_w) == pytest.approx(0, abs=0.02)


def test_a_fit_of_two_modes_is_reliable_and_is_kept_by_files(tmp_path):
    """Two Gaussians at ±6, .7 and .3: the flow itself has both; loaded, it scores as before."""
    truth = Mixture(torch.tensor([[6.0, 0.0], [-6.0, 0.0]]).double(), 1.0, torch.tensor([0.7, 0.3]), fixed=True)
    target = LogDensity(truth.log_prob, 2)
    posterior = vf.fit(target, progress=False)
    assert posterior.verdict.status == "reliable"
    assert "mixture of 2 Gaussians at 2 optima" in posterior.flow_description
    own = posterior.sample(20_000, weighted=False, seed=1)
    assert float((own[:, 0] > 0).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert posterior.log_evidence == pytest.approx(0, abs=0.01)
    loaded = vf.load(posterior.save(tmp_path / "two.safetensors"), target=target)
    x = posterior.flow_draws[:50]
    assert torch.allclose(loaded.log_prob(x), posterior.log_prob(x))


def test_a_gaussian_asked_for_is_one_gaussian():
    """flow="gaussian" has no mixture under it; the proposal sees the other mode."""
    truth = Mixture(torch.tensor([[6.0], [-6.0]]).double(), fixed=True)
    posterior = vf.fit(LogDensity(truth.log_prob, 1), flow="gaussian", progress=False)
    assert isinstance(posterior.flow.base, StandardNormal)
    assert posterior.verdict.status == "corrected"


@pytest.mark.slow
def test_all_forty_components():
    gmm = catalogue.gmm40()
    posterior = vf.fit(gmm, progress=False)
    own = posterior.sample(20_000, weighted=False, seed=1)
    shares = gmm.mode_of(own).bincount(minlength=40) / len(own)
    assert posterior.verdict.status == "reliable"
    assert shares.min() > 0.01 and shares.max() < 0.05


def test_starts_that_cannot_be_used_stay_as_they_are():
    """Gaussian VI in a batch: what overflows reverts to its start, and the others are as if alone."""
    target = LogDensity(lambda x: -0.5 * (x - 1).square().sum(-1), 2)
    start = gaussians([[0.0, 0.0], [0.0, 0.0]], 1.0)
    start.scale_tril[1] = torch.tensor([[1e200, 0.0], [0.0, 1e-200]])
    found = gaussian_vi(target, start, iterations=40)
    assert torch.equal(found.scale_tril[1], start.scale_tril[1])
    assert (found.loc[0] - 1).abs().max() < 0.02


def test_a_covariance_that_rounding_spoilt_gives_its_diagonal():
    spoilt = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double() * torch.tensor([[1e12, 1.0], [1.0, 1e-12]])
    assert torch.allclose(scale_of(spoilt), torch.diag(torch.tensor([1e6, 1e-6]).double()), rtol=1e-6, atol=0)
    fine = torch.tensor([[1e12, 0.5], [0.5, 1e-12]]).double()
    assert torch.allclose(scale_of(fine) @ scale_of(fine).mT, fine, rtol=1e-9, atol=0)
