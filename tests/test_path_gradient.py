"""Path gradients by the score's recursion, against the held inverse, against zero, and recorded against eager."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import vi_flows as vf
from vi_flows.flows import recipes
from vi_flows.flows.bases import Mixture, StudentT
from vi_flows.flows.bijection import Bijection
from vi_flows.flows.distribution import Flow
from vi_flows.flows.inversion import where_converged
from vi_flows.flows.layers.lowrank import Radial
from vi_flows.flows.parameters import Parametric
from vi_flows.guides.auto_flow import PathScored
from vi_flows.inference.train import step as steps_module
from vi_flows.inference.train.step import Flat, Gradient, ReverseKL

VARIANTS = {name: (name, {}) for name in recipes.__all__} | {
    "householder": ("sylvester", {"kind": "householder"}),
    "triangular": ("sylvester", {"kind": "triangular"}),
    "permuted spline": ("spline", {"mixing": "permutation"}),
    "one hidden layer": ("iaf", {"hidden": (9,)}),
    "narrow": ("spline_autoregressive", {"hidden": (3, 7, 4)}),
    "student base": ("realnvp", {"base": StudentT}),
    "mixture base": ("iaf", {"base": lambda dim: Mixture(torch.randn(3, dim), 0.5)}),
}


def build(variant, dim, context=None, sd=0.3, dtype=torch.float64):
    """A flow with all parameters perturbed."""
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    options = options | ({"base": options["base"](dim)} if "base" in options else {})
    flow = getattr(recipes, name)(dim, context, **options).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += sd * torch.randn_like(parameter)
    return flow


class HeldInverse(torch.nn.Module):
    """log q(x) by the inverse, as a module whose parameters functional_call can hold."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context):
        q = self.flow(context)
        z, logdet = q.bijection.inverse_and_logdet(x)
        return q.base.log_prob(z) + logdet


def by_the_inverse(flow, noise, context=None):
    x, _ = flow(context).from_noise(noise)
    held = {f"flow.{name}": t.detach() for name, t in [*flow.named_parameters(), *flow.named_buffers()]}
    return functional_call(HeldInverse(flow), held, (x, context))


def gradient(flow, value):
    """The gradient of a sum in all parameters, as one vector."""
    torch.manual_seed(1)
    weighted = (value * torch.randn_like(value)).sum()
    parts = torch.autograd.grad(weighted, list(flow.parameters()), materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def assert_same(flow, noise, context=None, tolerance=1e-8):
    """Value and gradient of log q(x), parameters held, by the recursion and by the inverse."""
    found, expected = flow(context).from_noise(noise, path=True)[1], by_the_inverse(flow, noise, context)
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    found, expected = gradient(flow, found), gradient(flow, expected)
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("context", [None, 3], ids=["own", "context"])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recursion_is_the_held_inverse(variant, dim, context):
    flow = build(variant, dim, context)
    given = None if context is None else torch.randn(4, context, dtype=torch.float64)
    noise = flow.base.noise((7,) if context is None else (2, 4))
    noise[0, ..., :dim] *= 4  # beyond the splines' interval, and where conditioners see z clamped
    assert_same(flow, noise, given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32(variant):
    flow = build(variant, 3, sd=0.05, dtype=torch.float32)
    x, log_q = flow().from_noise(noise := flow.base.noise((8,)), path=True)
    assert x.dtype == log_q.dtype == torch.float32
    found = gradient(flow, log_q)
    expected = gradient(flow.double(), by_the_inverse(flow, noise.double()))
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("variant", ["planar", "sylvester", "radial", "spline", "spline_autoregressive", "maf"])
def test_batch_shapes(variant, shape):
    flow = build(variant, 3)
    noise = flow.base.noise(shape)
    if 0 in shape:
        assert flow().from_noise(noise, path=True)[1].shape == shape
    else:
        assert_same(flow, noise)


def test_noise_is_expanded_to_the_batch_of_the_context():
    flow = build("iaf", 3, 2)
    context, noise = torch.randn(4, 2, dtype=torch.float64), flow.base.noise(())
    x, log_q = flow(context).from_noise(noise, path=True)
    assert x.shape == (4, 3) and log_q.shape == (4,)
    assert_same(flow, noise.expand(4, 3), context)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_zero_where_q_is_p(variant):
    """log p(x) − log q(x) is constant in x, so nothing is left of a gradient that comes through x alone."""
    flow = build(variant, 3, sd=0.2)
    target = copy.deepcopy(flow).requires_grad_(False)
    noise, pull = flow.base.noise((20,)), {}
    for path in (True, False):
        x, log_q = flow().from_noise(noise, path)
        pull[path] = float(gradient(flow, target().log_prob(x) - log_q).abs().max())
    assert pull[True] < 1e-9 * pull[False]


@pytest.mark.parametrize("variant", ["planar", "radial", "sylvester", "iaf", "spline", "mixture base"])
def test_the_mean_is_that_of_the_total_gradient(variant):
    flow = build(variant, 2, sd=0.1)
    target = vf.LogDensity(lambda x: -0.4 * (x - 0.3).square().sum(-1) - 0.1 * x.pow(4).sum(-1), dim=2)
    mean, variance = {}, {}
    for path in (True, False):
        step = ReverseKL(flow, target, path=path)
        steps = Gradient(step, Flat(step), record=False)
        rows = torch.stack([steps(steps.flat.vector, flow.base.noise((500,)))[0] for _ in range(40)])
        mean[path], variance[path] = rows.mean(0), rows.var(0) / len(rows)
    z = (mean[True] - mean[False]) / (variance[True] + variance[False]).sqrt().clamp_min(1e-9)
    assert float(z.square().mean()) < 2.0 and float(z.abs().max()) < 6.0
    assert float(mean[False].abs().max()) > 0.01


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(recipes.__all__)))  # the others: test_capture.py
def test_recorded_steps_are_eager_ones(variant):
    flow = build(variant, 3, sd=0.05)
    step = ReverseKL(flow, vf.LogDensity(lambda x: -x.square().sum(-1) - 0.1 * x.pow(4).sum(-1), dim=3), path=True)
    steps = Gradient(step, Flat(step))
    for _ in range(steps_module.STEPS_BEFORE_RECORDING + 2):
        noise = flow.base.noise((16,))
        found, expected = (run(steps.flat.vector, noise) for run in (steps, steps.eagerly))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert steps.run is not None and not steps.refused


class Stretch(Bijection):
    """x = a z + sinh(z) with a > 0: a bijection with the two directions only, as a user writes one."""

    converged = True

    @staticmethod
    def start(dim):
        return {"log_a": torch.zeros(dim)}

    def __init__(self, log_a):
        self.a = log_a.exp()

    def forward_and_logdet(self, z):
        return self.a * z + z.sinh(), (self.a + z.cosh()).log().sum(-1)

    def inverse_and_logdet(self, x):
        z = torch.zeros_like(x)
        for _ in range(60):  # Newton's method from the inflection, with the graph
            z = z - (self.a * z + z.sinh() - x) / (self.a + z.cosh())
        logdet = -(self.a + z.cosh()).log().sum(-1)
        return z, where_converged(logdet, torch.full_like(logdet, self.converged, dtype=torch.bool))


def test_a_bijection_without_a_recursion_of_its_own(monkeypatch):
    torch.manual_seed(0)
    flow = build("planar", 3)
    flow = Flow([flow.layers[0], Parametric(Stretch, 3).double(), flow.layers[1]], flow.base)
    noise = flow.base.noise((7,))
    assert_same(flow, noise)
    monkeypatch.setattr(Stretch, "converged", False)
    assert gradient(flow, flow().from_noise(noise, path=True)[1]).isnan().any()


def test_a_radial_layer_at_its_centre():
    bijection = Radial(torch.tensor([0.5, -1.0]), torch.tensor(0.3), torch.tensor(0.7))
    score = torch.tensor([2.0, -3.0])
    x, _, found = bijection.forward_and_score(bijection.centre.clone().requires_grad_(), score)
    slope = 1 + bijection.beta / bijection.alpha  # in every direction; log|det| has its peak, or its pit, there
    assert torch.equal(x, bijection.centre) and torch.allclose(found, score / slope)


def test_without_a_graph_there_is_no_recursion():
    flow = build("spline", 3)
    noise = flow.base.noise((5,))
    with torch.no_grad():
        pairs = zip(flow().from_noise(noise, path=True), flow().from_noise(noise), strict=True)
    assert all(torch.equal(found, expected) and not found.requires_grad for found, expected in pairs)


def test_a_guides_law_scores_its_draws_along_the_path():
    flow = build("iaf", 3)
    law = PathScored(flow().base, flow().bijection).expand((6,))
    with torch.random.fork_rng():
        x = law.rsample()
    expected = by_the_inverse(flow, flow.base.noise((6,)))
    assert isinstance(law, PathScored) and torch.allclose(law.log_prob(x), expected)
    assert torch.allclose(gradient(flow, law.log_prob(x)), gradient(flow, expected), rtol=1e-8, atol=1e-8)


def test_the_page_on_the_autoregressive_score():
    """Its example of three coordinates, worked by hand, is what the layer gives; sweeps are whole passes."""
    page = (Path(__file__).parent.parent / "docs" / "autoregressive_score.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    assert names["score"].shape == (3,) and len(names["found"]) == 3
