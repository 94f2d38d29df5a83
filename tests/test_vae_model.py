"""The VAE's terms, its objectives' gradients, and its use as a Pyro model and guide."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from vi_flows.flows import recipes
from vi_flows.running import seeded
from vi_flows.vae.likelihoods import LIKELIHOODS
from vi_flows.vae.model import POSTERIORS, VAE, Architecture, build
from vi_flows.vae.objectives import OBJECTIVES, elbo

SHAPE = (1, 4, 4)


def small(**options):
    torch.manual_seed(0)
    return build(Architecture(SHAPE, latent=3, network_options={"hidden": (12, 8)}, **options))


def bits(n=5):
    return torch.bernoulli(torch.full((n, 16), 0.4), generator=torch.Generator().manual_seed(1))


class Gaussian(nn.Module):
    """p(x|z) = N(x; z, I) as a likelihood of raw = z: with p(z) = N(0, I) the posterior is N(x/2, I/2)."""

    def log_prob(self, raw, x):
        return -0.5 * (raw - x).square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


class Copy(nn.Module):
    """z · gain: a decoder of one parameter, or an encoder of none."""

    def __init__(self, gain=None):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain))) if gain is not None else 1.0

    def forward(self, z):
        return z * self.gain


def conjugate(gain=0.8):
    """One latent number, p(x|z) = N(gain · z, 1), and a Gaussian q(z|x) somewhere else."""
    torch.manual_seed(0)
    posterior = recipes.diagonal(1, 1)
    vae = VAE(Copy(), posterior, Copy(gain), Gaussian()).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.normal_(0, 0.3)
    return vae


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_mixed_precision_is_near_and_only_in_training(network):
    torch.manual_seed(0)
    vae, x = build(Architecture((1, 8, 8), latent=3, network=network, posterior="iaf")), torch.ones(4, 64)
    noise = vae.posterior.base.noise((2, 4))
    full = vae(x, noise).log_likelihood
    vae.mixed = True
    near = vae(x, noise)
    near.log_w.mean().backward()
    assert near.z.dtype == near.log_likelihood.dtype == torch.float32
    assert 0 < (near.log_likelihood - full).abs().max() < 0.02 * full.abs().max()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())
    assert torch.equal(vae.eval()(x, noise).log_likelihood, full)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("prior", ["normal", "flow"])
def test_terms_are_what_they_say(posterior, prior):
    """log q is that of the posterior at z, log p(z) the prior's, and the weights are their sum; every head learns."""
    vae, x = small(posterior=posterior, prior=prior).double(), bits().double()
    terms = vae(x, 7)
    assert terms.z.shape == (7, 5, 3) and terms.log_w.shape == (7, 5)
    with torch.no_grad():
        log_q = vae.posterior(vae.encoder(x)).log_prob(terms.z)
    assert torch.allclose(terms.log_q, log_q, atol=1e-8)
    assert torch.allclose(terms.log_prior, vae.prior().log_prob(terms.z))
    assert torch.allclose(terms.log_w, terms.log_likelihood + terms.log_prior - terms.log_q)
    assert torch.allclose(terms.annealed(0.0), terms.log_likelihood)
    elbo(terms).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_is_built_and_sampled(name):
    vae = small(likelihood=name)
    x = bits()
    assert vae(x, 2).log_w.shape == (2, 5) and bool(vae(x, 2).log_w.isfinite().all())
    with seeded(0):
        assert vae.sample(6).shape == (6, 16) and vae.sample(6, mean=False).shape == (6, 16)


def test_doubly_reparametrised_gradients_are_those_of_iwae():
    """Averages of both over 40,000 rows agree within 4.5 standard errors."""
    vae = conjugate()
    x = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None].repeat(5000, 1)

    def gradients(name):
        objective, path = OBJECTIVES[name]
        parts = []
        with seeded(3):
            for rows in x.split(400):
                value = objective(vae(rows, 4, path), 1.0).mean()
                parts.append(torch.stack([g.sum() for g in torch.autograd.grad(value, list(vae.parameters()))]))
        parts = torch.stack(parts)
        return parts.mean(0), parts.std(0) / math.sqrt(len(parts))

    (iwae, se_iwae), (dreg, se_dreg) = gradients("iwae"), gradients("dreg")
    assert ((iwae - dreg).abs() < 4.5 * (se_iwae**2 + se_dreg**2).sqrt()).all()
    assert (iwae.abs() > 3 * se_iwae).any()


def test_the_path_gradient_vanishes_at_the_exact_posterior():
    """q(z|x) = N(x/2, 1/2) is the posterior of p(x|z) = N(z, 1): log w is log p(x), and no encoder gradient is left."""
    vae = conjugate(gain=1.0)
    x = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None]
    _fit_affine(vae.posterior, x, slope=0.5, sd=math.sqrt(0.5))
    terms = vae(x, 50, True)
    exact = torch.distributions.Normal(0.0, math.sqrt(2)).log_prob(x[:, 0])
    assert torch.allclose(terms.log_w, exact.expand(50, -1), atol=1e-6)
    gradients = torch.autograd.grad(elbo(terms).sum(), list(vae.posterior.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-5
    total = torch.autograd.grad(elbo(vae(x, 50)).sum(), list(vae.posterior.parameters()))
    assert max(float(g.abs().max()) for g in total) > 1e-3


def _fit_affine(flow, x, slope, sd):
    """Train a diagonal posterior's head until z = slope · x + sd · ε."""
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-18)
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, len(x), 1)

    def closure():
        optimizer.zero_grad()
        loss = (flow(x).from_noise(noise)[0] - slope * x - sd * noise).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) < 1e-12


def test_as_a_pyro_model_and_guide():
    """Trace_ELBO is minus the sum of the rows' ELBOs (within 4 standard errors), SVI trains, Predictive draws x."""
    pyro.clear_param_store()
    vae, x = small(posterior="planar"), bits(2).repeat(10, 1)  # two patterns, to be learnt
    with seeded(0):
        losses = torch.tensor([Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(100)])
        own = -vae(x, 2000).log_w.detach().sum(1)
    se = math.sqrt(float(losses.var()) / len(losses) + float(own.var()) / len(own))
    assert abs(float(losses.mean() - own.mean())) < 4 * se
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    with seeded(1):
        steps = [svi.step(x) for _ in range(120)]
    assert sum(steps[-20:]) / 20 < 0.85 * sum(steps[:5]) / 5
    drawn = Predictive(vae.model, num_samples=3)(x)
    assert drawn["z"].shape == (3, 20, 3)
    pyro.clear_param_store()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latent": 0}, "latent: expected a positive integer, got 0"),
        ({"posterior": "planr"}, "posterior: expected one of diagonal, full, planar"),
        ({"likelihood": "poisson"}, "likelihood: expected one of"),
        ({"network": "vit"}, "network: expected one of mlp, conv, residual"),
        ({"prior": "vamp"}, "prior: expected one of normal, flow"),
    ],
)
def test_bad_architectures(given, message):
    with pytest.raises(ValueError, match=message):
        Architecture(SHAPE, **given)


def test_flows_that_do_not_fit():
    vae = small()
    with pytest.raises(ValueError, match="posterior: expected a flow with a context"):
        VAE(vae.encoder, recipes.planar(3), vae.decoder, vae.likelihood)
    with pytest.raises(ValueError, match="prior: expected a flow of dim 3 without context, got dim 2"):
        VAE(vae.encoder, vae.posterior, vae.decoder, vae.likelihood, prior=recipes.realnvp(2))
