"""Objectives and weights against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import vi_flows as vf
from vi_flows.inference.estimate.psis import khat, khat_upper, smooth
from vi_flows.inference.estimate.quantities import estimate, flatten, resample
from vi_flows.inference.estimate.weights import effective_sample_size, log_mean, log_mean_se, log_weights, mean_elbo
from vi_flows.inference.train.objectives import elbo, iwae, renyi
from vi_flows.inference.train.step import Flat, ReverseKL


def gaussian_flow(dim: int, mean: float, sd: float) -> vf.Flow:
    flow = vf.recipes.diagonal(dim).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(
                torch.stack([torch.full((dim,), 10 * math.atanh(math.log(sd) / 10)), torch.full((dim,), mean)])
            )
    return flow


def normal_target(dim: int, mean: float = 0.0, sd: float = 1.0, log_z: float = 0.0) -> vf.LogDensity:
    normal = torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(sd).double())
    return vf.LogDensity(lambda x: normal.log_prob(x).sum(-1) + log_z, dim=dim)


def test_elbo_of_a_gaussian_is_its_kl():
    """KL(N(m, s²) ‖ N(0, 1)) = ½ (s² + m² − 1) − log s, each coordinate."""
    torch.manual_seed(0)
    with torch.no_grad():
        w = log_weights(gaussian_flow(3, 0.5, 0.8), normal_target(3, log_z=2.0), 200_000)
    exact = 2.0 - 3 * (0.5 * (0.8**2 + 0.5**2 - 1) - math.log(0.8))
    se = float(w.log_w.detach().std()) / math.sqrt(len(w.log_w))
    assert abs(float(elbo(w.log_w)) - exact) < 4 * se
    assert float(renyi(w.log_w, 1)) == float(elbo(w.log_w))


def test_bounds_are_ordered_and_iwae_is_renyi_of_order_0():
    torch.manual_seed(0)
    log_w = torch.randn(64, 1000).double()
    values = [float(renyi(log_w, alpha)) for alpha in (1.0, 0.5, 0.0, -1.0)]
    assert values == sorted(values)
    assert float(iwae(log_w)) == pytest.approx(float(renyi(log_w, 0.0)), abs=1e-12)
    assert float(iwae(log_w[:1])) == pytest.approx(float(elbo(log_w[:1])), abs=1e-12)


def test_renyi_closed_form():
    """For log w ~ N(m, v): (1/(1−α)) log E w^{1−α} = m + (1−α) v/2."""
    torch.manual_seed(1)
    log_w = 0.3 + 0.5 * torch.randn(400_000).double()
    assert float(renyi(log_w, 0.5)) == pytest.approx(0.3 + 0.5 * 0.25 / 2, abs=4e-3)


@pytest.mark.parametrize("recipe", ["gaussian", "spline", "planar", "iaf"])
def test_path_gradient_has_the_mean_of_the_total_gradient(recipe):
    torch.manual_seed(0)
    flow = getattr(vf.recipes, recipe)(2).double()
    target = normal_target(2, 0.4, 1.3)
    gradients = {}
    for path in (False, True):
        step = ReverseKL(flow, target, path=path)
        rows = []
        for _ in range(60):
            loss, _ = step(flow.base.noise((500,)))
            gradient = torch.autograd.grad(loss, [p for p in step.parameters()])
            rows.append(torch.cat([g.reshape(-1) for g in gradient]))
        gradients[path] = torch.stack(rows)
    mean, se = ({k: f(v) for k, v in gradients.items()} for f in (lambda v: v.mean(0), lambda v: v.std(0) / 60**0.5))
    z = (mean[True] - mean[False]) / (se[True].square() + se[False].square()).sqrt().clamp_min(1e-9)
    assert float(z.square().mean()) < 2.0
    assert float(z.abs().max()) < 6.0


def test_path_gradient_is_zero_at_the_target():
    flow = gaussian_flow(2, 0.3, 1.4)
    step = ReverseKL(flow, normal_target(2, 0.3, 1.4), path=True)
    loss, _ = step(flow.base.noise((100,)))
    (gradient,) = torch.autograd.grad(loss, list(step.parameters()))
    assert float(gradient.abs().max()) < 1e-6


def test_path_with_another_objective_is_refused():
    with pytest.raises(ValueError, match="path: the path gradient belongs to the ELBO"):
        ReverseKL(vf.recipes.planar(2), normal_target(2), objective=partial(renyi, alpha=0.5), path=True)


def test_flat_parameters_round_trip():
    flow = vf.recipes.sylvester(3).double()
    flat = Flat(flow)
    flat.store(flow, flat.vector + 1)
    assert torch.equal(Flat(flow).vector, flat.vector + 1)
    assert sum(p.numel() for p in flow.parameters()) == len(flat.vector)


def test_weights_of_constant_log_w():
    log_w = torch.full((1000,), 3.0).double()
    assert log_mean(log_w) == pytest.approx(3.0, abs=1e-12)
    assert log_mean_se(log_w) == pytest.approx(0.0, abs=1e-6)
    assert effective_sample_size(log_w) == pytest.approx(1000)
    assert khat(log_w) == 0.0


def test_elbo_counts_draws_outside_the_support():
    log_w = torch.tensor([1.0, 1.0, -math.inf, 1.0]).double()
    assert mean_elbo(log_w) == pytest.approx(1.0 + math.log(0.75))
    assert mean_elbo(torch.full((3,), -math.inf)) == -math.inf


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.0])
def test_khat_of_generalised_pareto_weights(shape):
    torch.manual_seed(0)
    estimates = []
    for _ in range(20):
        u = torch.rand(10_000).double()
        estimates.append(khat(((u**-shape - 1) / shape).log()))
    assert sum(estimates) / 20 == pytest.approx(shape, abs=0.1)


def test_smoothing_keeps_zero_weights_and_order():
    torch.manual_seed(0)
    log_w = 2 * torch.randn(2000).double()
    log_w[:10] = -math.inf
    smoothed, shape = smooth(log_w)
    assert (smoothed[:10] == -math.inf).all() and math.isfinite(shape)
    assert torch.equal(smoothed[10:].argsort(), log_w[10:].argsort())
    assert khat_upper(0.5, 10_000) == pytest.approx(0.5 + 1.28 * 1.5 / 300**0.5)
    assert smooth(torch.full((50,), -math.inf).double())[1] == math.inf


def test_estimates_under_weights():
    """Draws of N(0, 1) weighted to N(0.5, 1): mean, sd, quantiles and honest standard errors."""
    torch.manual_seed(0)
    means, ses = [], []
    for _ in range(200):
        x = torch.randn(1000, 1).double()
        values = estimate(x, 0.5 * x[:, 0] - 0.125)
        means.append(float(values.mean))
        ses.append(float(values.mean_se))
    spread = torch.tensor(means).std()
    assert float(torch.tensor(means).mean()) == pytest.approx(0.5, abs=4 * float(spread) / 200**0.5)
    assert sum(ses) / 200 == pytest.approx(float(spread), rel=0.15)
    x = torch.randn(200_000, 1).double()
    values = estimate(x, 0.5 * x[:, 0])
    assert float(values.sd) == pytest.approx(1.0, abs=0.02)
    assert values.quantiles[:, 0].tolist() == pytest.approx([0.5 - 1.645, 0.5, 0.5 + 1.645], abs=0.03)


def test_resampling_follows_the_weights():
    torch.manual_seed(0)
    index = resample(torch.tensor([0.1, 0.2, 0.7]).double().log(), 1000)
    assert torch.bincount(index, minlength=3).tolist() == [100, 200, 700]


def test_names_of_flattened_values():
    names, theta = flatten({"a": torch.zeros(5), "b": torch.ones(5, 2), "c": torch.ones(5, 1, 2)})
    assert names == ["a", "b[0]", "b[1]", "c[0,0]", "c[0,1]"]
    assert theta.shape == (5, 5)
