"""PyroModel: the model zoo (by vmap, by a fallback, refused), hand-written densities, and what a failing row costs."""

import math
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

from vi_flows.targets import PyroModel, check_target, resolve_target, settle_dtype

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
FEW = torch.tensor([0.3, -1.2, 0.8, 2.0])


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0, 1))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def many_supports():
    pyro.sample("positive", dist.Gamma(2.0, 3.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample(
        "ordered",
        dist.TransformedDistribution(dist.Normal(0, 1).expand([3]).to_event(1), dist.transforms.OrderedTransform()),
    )
    pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    pyro.sample("pareto", dist.Pareto(1.0, 3.0))


def correlated(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=scale[:, None] * corr), obs=y)


def categorical(y):
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Categorical(probs), obs=y)


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(0, 3).expand([2]).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(loc, torch.ones(2))), obs=y)


def mixture_prior(y):
    parts = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.LogNormal(torch.tensor([0.0, 1.0]), torch.ones(2))
    )
    s = pyro.sample("s", parts)
    pyro.sample("y", dist.Normal(0, s).expand([len(y)]).to_event(1), obs=y)


def transformed(y):
    x = pyro.sample("x", dist.TransformedDistribution(dist.Normal(0, 1), [dist.transforms.ExpTransform()]))
    pyro.sample("y", dist.Normal(x, 1).expand([len(y)]).to_event(1), obs=y)


def flat_prior(y):
    b = pyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1).mask(False))
    s = pyro.sample("s", dist.HalfNormal(1.0).mask(False))
    pyro.factor("lik", dist.Normal(b[0] + b[1] * torch.arange(len(y)), s).log_prob(y).sum())


def imputed(y, observed):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.LogNormal(mu, 1.0), obs=y, obs_mask=observed)


def nested(y):
    a = pyro.sample("a", dist.HalfNormal(1.0))
    with pyro.plate("columns", y.shape[1], dim=-1):
        b = pyro.sample("b", dist.Normal(0, a))
        with pyro.plate("rows", y.shape[0], dim=-2):
            c = pyro.sample("c", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(b, c), obs=y)


def sequential(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    for i in pyro.plate("n", len(y)):
        z = pyro.sample(f"z{i}", dist.Normal(mu, 1))
        pyro.sample(f"y{i}", dist.Normal(z, 1), obs=y[i])


def undeclared_batch(y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y)


def with_param(y):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(mu, scale).expand([len(y)]).to_event(1), obs=y)


def scaled(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with poutine.scale(scale=3.0), pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1), obs=y)


def centred(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("n", len(y)):
        b = pyro.sample("b", dist.Normal(0, tau))
        pyro.sample("y", dist.Normal(b, 1), obs=y)


def ordered_logistic(y):
    cut = dist.TransformedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), dist.transforms.OrderedTransform())
    cut, eta = pyro.sample("cut", cut), pyro.sample("eta", dist.Normal(0, 1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.OrderedLogistic(eta, cut), obs=y.gt(0).long())


def bounded_by_latent(y):
    bound = pyro.sample("bound", dist.Pareto(1.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Uniform(-bound, bound), obs=y)


def many_arguments(data, *, prior):
    mu = pyro.sample("mu", dist.Normal(prior["loc"], prior["scale"][0]))
    pyro.sample("y", dist.Normal(mu, 1).expand([len(data[0])]).to_event(1), obs=data[0])


class Regression(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = pyro.nn.PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(0, 1).expand([1, 1]).to_event(2))
        self.linear.bias = pyro.nn.PyroSample(dist.Normal(0, 1).expand([1]).to_event(1))

    def forward(self, x, y):
        mean = self.linear(x[:, None]).squeeze(-1)
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MASK = torch.tensor([True, False, True, True])
BY_VMAP = {
    "eight schools": (eight_schools, (Y, SIGMA), {}, 10),
    "1-D latent": (conjugate, (FEW,), {}, 1),
    "many supports": (many_supports, (), {}, 3 + 2 + 3 + 3 + 1),
    "LKJ, multivariate normal": (correlated, (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),), {}, 9),
    "categorical": (categorical, (torch.tensor([0, 2, 1, 1]),), {}, 2),
    "mixture": (mixture, (FEW,), {}, 3),
    "mixture prior": (mixture_prior, (FEW,), {}, 1),
    "transformed distribution": (transformed, (FEW,), {}, 1),
    "flat prior, factor": (flat_prior, (FEW,), {}, 3),
    "imputed data": (imputed, (FEW.abs(), MASK), {}, 2),
    "nested plates": (nested, (torch.ones(3, 4),), {}, 1 + 4 + 12),
    "sequential plate": (sequential, (FEW,), {}, 5),
    "undeclared batch": (undeclared_batch, (FEW,), {}, 3),
    "pyro.param": (with_param, (FEW,), {}, 1),
    "scaled": (scaled, (FEW,), {}, 1),
    "nested arguments": (
        many_arguments,
        ([FEW, "name"],),
        {"prior": {"loc": torch.tensor(1.0), "scale": (torch.tensor(2.0),)}},
        1,
    ),
    "module": (Regression(), (FEW, FEW), {}, 2),
    "reparametrised": (poutine.reparam(centred, {"b": LocScaleReparam(0.0)}), (FEW,), {}, 5),
    "data bounded by a latent": (bounded_by_latent, (0.4 * FEW,), {}, 1),
    "conditioned": (poutine.condition(conjugate, data={"mu0": torch.tensor(0.0)}), (FEW,), {}, 1),
}


def small(dim, n=6, scale=0.5):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def one_by_one(target, x):
    """log p by a plain trace of each point in turn, with torch's own transforms: nothing of PyroModel's evaluation."""
    model, args, kwargs = target._run.model, target._run.args, target._run.kwargs
    rows = []
    with target._run.settings():
        for row in x:
            values, total = {}, 0.0
            for site in target.sites:
                value, log_det = site.constrained(row[None])
                values[site.name], total = value[0], total + (0.0 if log_det is None else log_det[0])
            with pyro.get_param_store().scope():
                trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            rows.append(total + trace.log_prob_sum())
    return torch.stack(rows)


@pytest.mark.parametrize("name", BY_VMAP)
def test_model_by_vmap(name):
    model, args, kwargs, dim = BY_VMAP[name]
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = PyroModel(model, *args, **kwargs)
    assert (target.mode, target.dim) == ("vmap", dim), target.mode_reason
    assert target.dtype == torch.float64 and len(target.coordinate_names()) == dim
    x = small(dim)
    assert torch.allclose(target.log_prob(x), one_by_one(target, x), rtol=1e-9, atol=0)
    check_target(target, x)
    assert len(pyro.get_param_store()) == 0
    named = target.constrain(x)
    assert torch.allclose(target.unconstrain(named), x, atol=1e-8)
    assert torch.allclose(target.unconstrain({k: v[2] for k, v in named.items()}), x[2], atol=1e-8)
    assert set(named) == set(target.names) | set(target.deterministic)
    draws = target.prior(3)
    assert draws.shape == (3, dim) and bool(draws.isfinite().all())


def branch(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(mu if mu > 0 else 2 * mu, 1).expand([len(y)]).to_event(1), obs=y)


def item(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    pyro.deterministic("twice", 2 * mu)
    pyro.sample("y", dist.Normal(mu, 1 + abs(math.sin(s.item()))).expand([len(y)]).to_event(1), obs=y)


class VmapShy(torch.autograd.Function):
    """Exp without a vmap rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def no_vmap_rule(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(VmapShy.apply(mu) + z, 1.0), obs=y)


def ordered_regression(y):
    cut = dist.TransformedDistribution(dist.Normal(0, 1).expand([2]).to_event(1), dist.transforms.OrderedTransform())
    cut = pyro.sample("cut", cut)
    b = pyro.sample("b", dist.Normal(0, 1).expand([3]).to_event(1))
    design = torch.arange(3.0 * len(y)).reshape(len(y), 3).sin().to(b)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.OrderedLogistic(design @ b, cut), obs=y.gt(0).long() + y.gt(1).long())


def filled_over_time(y):
    phi, z = (
        pyro.sample("phi", dist.Beta(2.0, 2.0)),
        pyro.sample("z", dist.Normal(0, 1).expand([len(y) + 1]).to_event(1)),
    )
    state, last = y.new_zeros(len(y)), z[0]
    for t in range(len(y)):
        state[t] = last
        last = phi * last + z[t]
    pyro.deterministic("state", state)
    pyro.sample("y", dist.Normal(state, z[-1].exp()).to_event(1), obs=y)


def filled_by_numpy(y):
    mu, tau = pyro.sample("mu", dist.Normal(0, 1)), pyro.sample("tau", dist.HalfNormal(1.0))
    weights = np.zeros(len(y))
    weights[0] = float(mu.detach()) * 0 + 1
    pyro.deterministic("twice", 2 * mu)
    pyro.sample("y", dist.Normal(mu * torch.as_tensor(weights), tau).to_event(1), obs=y)


def discrete_hmm(y):
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0, 1).expand([2]).to_event(1))
    hmm = dist.DiscreteHMM(torch.zeros(2), rows.log(), dist.Normal(loc, 1.0), duration=len(y))
    pyro.sample("y", hmm, obs=y)


FALL_BACK = {
    "ordered logistic": (ordered_logistic, ("vmap",), 3),
    "ordered logistic regression": (ordered_regression, ("vmap",), 5),
    "a tensor filled over time": (filled_over_time, ("vmap",), 6),
    "an array that NumPy fills": (filled_by_numpy, ("loop",), 2),
    "no vmap rule": (no_vmap_rule, ("plate",), 5),
    "value branch": (branch, ("loop",), 1),
    ".item()": (item, ("loop",), 2),
    "DiscreteHMM": (discrete_hmm, ("vmap", "plate", "loop"), 4),
}


@pytest.mark.parametrize("name", FALL_BACK)
def test_model_falls_back(name):
    model, modes, dim = FALL_BACK[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target = PyroModel(model, FEW)
    messages = [str(w.message) for w in caught if "PyroModel" in str(w.message)]
    assert target.mode in modes and target.dim == dim
    assert target.mode == "vmap" or "vmap: " in target.mode_reason
    assert len(messages) == (target.mode == "loop")
    assert all(re.search(r"ms each, so that a default fit takes some \d+ minutes .*max_seconds=", m) for m in messages)
    x = small(dim)
    assert torch.allclose(target.log_prob(x), one_by_one(target, x), rtol=1e-9, atol=0)
    z = x.clone().requires_grad_()
    target.log_prob(z).sum().backward()
    assert bool(z.grad.isfinite().all())
    assert set(target.constrain(x)) == set(target.names) | set(target.deterministic)


def plate_without_a_size(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("n"):
        z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(y)]))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("same", dist.Normal(mu, 1.0), obs=y)


def ragged_in_a_plate_without_a_size(y):
    b = pyro.sample("b", dist.Normal(0, 1))
    with pyro.plate("n"):
        pyro.sample("y", dist.Normal(b * torch.ones(len(y), 1), 1.0), obs=y)


def test_a_plate_needs_no_size():
    target, x = PyroModel(plate_without_a_size, FEW), small(5)
    assert (target.mode, target.dim) == ("vmap", 5)
    assert torch.allclose(target.log_prob(x), one_by_one(target, x), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"site 'y': .* got \(4,\) against \(4, 1\), which broadcast to \(4, 4\)"):
        PyroModel(ragged_in_a_plate_without_a_size, FEW)


def test_a_model_says_what_it_was_given():
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(first.weight, 3.0)
    torch.nn.init.constant_(second.weight, 4.0)

    def model(y=None):
        pyro.param("wide", torch.arange(6.0).reshape(2, 3))
        pyro.module("first", first), pyro.module("second", second)
        mu = pyro.sample("mu", dist.Normal(0, 1))
        if y is not None:
            pyro.sample("y", dist.Normal(mu, 1).expand([len(y)]).to_event(1), obs=y)

    told = PyroModel(model, FEW).account()
    assert told[0] == "data: 'y' (4 values)." and "wide = 2 × 3 numbers from 0 to 5" in told[1]
    assert "first.weight = 3, " in told[1] and "second.weight = 4, " in told[1]
    assert PyroModel(model).account()[0].endswith("this is the prior.")
    assert PyroModel(flat_prior, FEW).account() == ["data: pyro.factor 'lik'."]
    conditioned = poutine.condition(conjugate, data={"mu0": torch.tensor(0.0)})
    assert len(PyroModel(conditioned, FEW).account()) == 1
    assert set(PyroModel(Plain(), FEW).fixed) == {"scale"}


class Plain(torch.nn.Module):
    """A module that reads a parameter of its own without telling Pyro."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(mu, self.scale).expand([len(y)]).to_event(1), obs=y)


def latent_support():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    pyro.sample("other", dist.Normal(0, 1))
    pyro.sample("u", dist.Uniform(0, s))


def random_structure():
    z = pyro.sample("z", dist.Normal(0, 1))
    if z > 0:
        pyro.sample("extra", dist.Normal(0, 1))


def random_size():
    z = pyro.sample("z", dist.Normal(0, 1))
    pyro.sample("extra", dist.Normal(0, 1).expand([1 + int(10 * z.abs())]).to_event(1))


def hidden_noise(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    pyro.sample("y", dist.Normal(mu + torch.randn(()), 1).expand([len(y)]).to_event(1), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("n", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1), obs=y[index])


def column_mean(y):
    b = pyro.sample("b", dist.Normal(0, 1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(b * torch.ones(len(y), 1), 1.0), obs=y)


def no_plate(y):
    mu = pyro.sample("mu", dist.Normal(0, 1).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(mu, 1), obs=y)


def prior_only(distribution):
    def model():
        pyro.sample("x", distribution())

    return model


def broken(y):
    pyro.sample("mu", dist.Normal(0, 1))
    raise KeyError("sigma")


def mistyped(y):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    return mu @ y


NAN = torch.tensor([1.0, 2.0, math.nan, 4.0])
REFUSED = {
    "no latent sites": (
        lambda: pyro.sample("y", dist.Normal(0, 1), obs=FEW[0]),
        (),
        "at least one latent pyro.sample site, got none",
    ),
    "NaN in data": (conjugate, (NAN,), r"site 'y': expected finite observed data, got nan at index \[2\]"),
    "inf in data": (
        conjugate,
        (NAN.nan_to_num(math.inf),),
        r"site 'y': expected finite observed data, got inf at index \[2\]",
    ),
    "empty data": (conjugate, (FEW[:0],), "a plate is empty, so pass data"),
    "empty data without a plate": (no_plate, (FEW[:0, None],), r"got an empty tensor of shape \(0, 1\)"),
    "latent-dependent support": (
        latent_support,
        (),
        "site 'u': .* got Uniform whose support depends on the latent site 's'",
    ),
    "ImproperUniform": (
        prior_only(lambda: dist.ImproperUniform(constraints.real, (), ())),
        (),
        r"site 'x': .*mask\(False\)",
    ),
    "discrete": (
        prior_only(lambda: dist.Bernoulli(0.5)),
        (),
        "site 'x': expected a continuous latent variable, got discrete Bernoulli",
    ),
    "Delta": (prior_only(lambda: dist.Delta(torch.tensor(1.0))), (), "site 'x': .* got Delta; use pyro.deterministic"),
    "Wishart": (
        prior_only(lambda: dist.Wishart(torch.tensor(3.0), torch.eye(2))),
        (),
        "site 'x': expected a support that",
    ),
    "sphere": (prior_only(lambda: dist.ProjectedNormal(torch.ones(3))), (), "site 'x': expected a support that"),
    "subsampling": (subsampled, (FEW,), "plate 'n': expected all 4 rows, got a subsample of 2"),
    "random structure": (random_structure, (), "the same sites in every run, got 'extra' in some runs only"),
    "random size": (random_size, (), "site 'extra': expected one shape in every run"),
    "hidden noise": (hidden_noise, (FEW,), "the same log density at the same values"),
    "(N, 1) data in a plate": (
        conjugate,
        (FEW[:, None],),
        r"site 'y': expected data of the distribution's shape, got \(4, 1\)",
    ),
    "(N, 1) mean in a plate": (column_mean, (FEW,), r"site 'y': .* got \(4,\) against \(4, 4\)"),
    "(N, 1) data without a plate": (no_plate, (FEW[:, None],), r"broadcast to \(4, 4\)"),
    "data of another length": (no_plate, (FEW[:3],), "model: expected to run"),
    "data outside the support": (
        lambda y: pyro.sample("y", dist.Poisson(pyro.sample("r", dist.Gamma(1.0, 1.0))), obs=y),
        (FEW[1],),
        "site 'y': expected data in the support",
    ),
    "KeyError inside": (broken, (FEW,), "got KeyError: 'sigma'"),
    "wrong shapes inside": (mistyped, (FEW,), "got RuntimeError: both arguments to matmul"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_is_refused_in_one_line(name):
    model, args, message = REFUSED[name]
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as caught:
        PyroModel(model, *args)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and "expected" in text and "got" in text
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((), {}, r"expected arguments for eight_schools\(y, sigma\), got: missing a required argument: 'y'"),
        ((Y,), {}, "missing a required argument: 'sigma'"),
        ((Y, SIGMA, 1), {}, "too many positional"),
        ((Y, SIGMA), {"prior": 1}, "unexpected keyword argument 'prior'"),
    ],
)
def test_arguments_of_the_model(args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        PyroModel(eight_schools, *args, **kwargs)


def test_hand_written_eight_schools():
    target = PyroModel(eight_schools, Y, SIGMA)
    x = small(10, n=20, scale=1.5)
    mu, log_tau, z = x[:, 0], x[:, 1], x[:, 2:]
    tau = log_tau.exp()
    log_p = -0.5 * (mu / 5) ** 2 - math.log(5) - 0.5 * math.log(2 * math.pi)
    log_p = log_p + math.log(2 / (math.pi * 5)) - torch.log1p((tau / 5) ** 2) + log_tau
    log_p = log_p + (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
    error = (Y - mu[:, None] - tau[:, None] * z) / SIGMA
    log_p = log_p + (-0.5 * error**2 - SIGMA.double().log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    assert torch.allclose(target.log_prob(x), log_p, rtol=1e-12)
    named = target.constrain(x)
    assert torch.allclose(named["theta"], mu[:, None] + tau[:, None] * z) and named["theta"].shape == (20, 8)
    assert target.coordinate_names() == ["mu", "tau", *(f"z[{i}]" for i in range(8))]
    assert target.names == ["mu", "tau", "z"] and target.deterministic == ["theta"]
    assert list(target.observed) == ["y"] and torch.equal(target.observed["y"], Y.double())


def test_log_determinants_against_the_autograd_jacobian():
    """log p is the prior's at T(x) plus log|det dT/dx|, here from the Jacobian of T's free coordinates."""
    target = PyroModel(many_supports)
    x = small(target.dim, n=4)

    def free(
        row,
    ):  # as many coordinates of T(x) as there are in x: the simplex without its last, the factor's lower triangle
        v = target.constrain(row[None])
        corr = v["corr"][0]
        return torch.cat([
            v["positive"], v["interval"], v["unit"], v["simplex"][0, :-1], v["ordered"][0],
            torch.stack([corr[1, 0], corr[2, 0], corr[2, 1]]), v["pareto"],
        ])  # fmt: skip

    for row in x:
        jacobian = torch.autograd.functional.jacobian(free, row)
        named = {k: v[0] for k, v in target.constrain(row[None]).items()}
        prior = sum(
            d.log_prob(named[k])
            for k, d in {
                "positive": dist.Gamma(2.0, 3.0), "interval": dist.Uniform(-1.0, 3.0), "unit": dist.Beta(2.0, 3.0),
                "simplex": dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]).double()),
                "corr": dist.LKJCholesky(3, torch.tensor(2.0).double()),
                "pareto": dist.Pareto(1.0, 3.0),
                "ordered": dist.TransformedDistribution(
                    dist.Normal(torch.zeros(3).double(), 1).to_event(1), dist.transforms.OrderedTransform()
                ),
            }.items()
        )  # fmt: skip
        assert torch.allclose(target.log_prob(row[None])[0], prior + torch.linalg.slogdet(jacobian)[1], rtol=1e-6)


def test_flat_prior_counts_nothing():
    target = PyroModel(flat_prior, FEW)
    x = small(3)
    mean = x[:, :1] + x[:, 1:2] * torch.arange(4)
    expected = dist.Normal(mean, x[:, 2:].exp()).log_prob(FEW.double()).sum(-1) + x[:, 2]
    assert torch.allclose(target.log_prob(x), expected)


def test_imputed_entries_only_are_coordinates():
    target = PyroModel(imputed, FEW.abs(), MASK)
    x = small(2)
    assert target.names == ["mu", "y_unobserved"] and target.coordinate_names() == ["mu", "y_unobserved[1]"]
    expected = dist.Normal(0, 1).log_prob(x[:, 0]) + dist.Normal(x[:, 0], 1).log_prob(x[:, 1])
    expected = expected + dist.LogNormal(x[:, :1], 1).log_prob(FEW.abs().double()[MASK]).sum(-1)
    assert torch.allclose(target.log_prob(x), expected)
    assert torch.allclose(target.constrain(x)["y"][:, 1], x[:, 1].exp())


def test_rows_that_raise_become_minus_inf():
    def gaussian_process(y):
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(0, 1))
        pyro.deterministic("b", a * torch.linalg.cholesky(torch.eye(2) * (1 + a)))
        cov = torch.eye(len(y)) * (1 + a) * length  # not positive definite for a <= -1
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=torch.linalg.cholesky(cov)), obs=y)

    target = PyroModel(gaussian_process, FEW)
    x = small(2, n=40, scale=0.2)
    x[[5, 17, 18], 1] = torch.tensor([-2.0, -3.0, -1.5], dtype=x.dtype)
    good = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor([5, 17, 18]), False)
    z = x.clone().requires_grad_()
    log_p = target.log_prob(z)
    log_p[good].sum().backward()
    assert target.mode == "vmap" and target.failed_rows == 3 and "cholesky" in target.last_failure
    assert torch.equal(log_p == -math.inf, ~good)
    assert torch.allclose(log_p[good], target.log_prob(x[good]), rtol=1e-12)
    w = x[good].clone().requires_grad_()
    target.log_prob(w).sum().backward()
    assert torch.allclose(z.grad[good], w.grad) and bool((z.grad[~good] == 0).all())
    assert torch.equal(target.constrain(x)["b"].isnan().flatten(1).all(-1), ~good)
    everywhere = x[~good].clone().requires_grad_()
    target.log_prob(everywhere).sum().backward()
    assert bool((everywhere.grad == 0).all())
    with pytest.raises(torch.linalg.LinAlgError):  # one bad row must not stand for all rows of somebody's vmap
        torch.func.vmap(lambda row: target.log_prob(row[None])[0])(x)


def test_gradient_and_functional_transforms():
    from torch.fx.experimental.proxy_tensor import make_fx

    target = PyroModel(eight_schools, Y, SIGMA)
    x = small(10)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    by_vmap = torch.func.vmap(torch.func.grad(lambda row: target.log_prob(row[None])[0]))(x)
    assert torch.allclose(gradient, by_vmap)
    captured = make_fx(lambda x: target.log_prob(x))(x)
    assert torch.allclose(captured(x + 1), target.log_prob(x + 1))
    assert torch.autograd.gradcheck(target.log_prob, (z,))


def test_global_state_is_restored():
    seen = {}

    def model(y):
        seen.update(dtype=torch.get_default_dtype(), validate=torch.distributions.Distribution._validate_args)
        conjugate(y)

    def state():
        torch_validates = torch.distributions.Distribution._validate_args
        return (
            torch.get_default_dtype(),
            torch_validates,
            dist.is_validation_enabled(),
            poutine.util.is_validation_enabled(),
        )

    before, rng = state(), torch.get_rng_state()
    target = PyroModel(model, FEW)
    target.log_prob(small(1))
    target.constrain(small(1))
    assert seen == {"dtype": torch.float64, "validate": False}
    assert state() == before and torch.equal(torch.get_rng_state(), rng)
    torch.distributions.Distribution.set_default_validate_args(False)
    apart = state()
    target.log_prob(small(1))
    assert state() == apart
    torch.distributions.Distribution.set_default_validate_args(before[1])
    with pytest.raises(ValueError, match="KeyError"):
        PyroModel(broken, FEW)
    assert state() == before
    target._run.model = broken
    with pytest.raises(KeyError):
        target.log_prob(small(1))
    assert state() == before


def test_parameter_store_is_left_alone():
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    stored = pyro.get_param_store()["scale"]
    target = PyroModel(with_param, FEW)
    x = small(1)
    expected = dist.Normal(0, 1).log_prob(x[:, 0]) + dist.Normal(x, 3.0).log_prob(FEW.double()).sum(-1)
    assert torch.allclose(target.log_prob(x), expected)
    pyro.clear_param_store()
    assert torch.allclose(target.log_prob(x), expected) and len(pyro.get_param_store()) == 0
    assert stored.dtype == torch.float32


def test_float32_tensors_of_its_own():
    x32 = torch.ones(4, 2)
    net = torch.nn.Linear(2, 1)

    def model(y):
        pyro.module("net", net)
        b = pyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(x32 @ b + net(x32).squeeze(-1), 1.0), obs=y)

    pyro.clear_param_store()
    target = PyroModel(model, FEW)
    x = small(2)
    assert target.dtype == torch.float32 and target.mode == "vmap"
    assert target.log_prob(x).dtype == torch.float64
    assert settle_dtype(target, x) is target
    assert len(pyro.get_param_store()) == 0


def test_to_another_dtype():
    target = PyroModel(eight_schools, Y, SIGMA)
    single = target.to(torch.float32)
    x = small(10)
    assert target.dtype == torch.float64 and single.dtype == torch.float32
    assert single.observed["y"].dtype == torch.float32
    assert torch.allclose(single.log_prob(x), target.log_prob(x), rtol=1e-5)


def test_unconstrain_refuses():
    target = PyroModel(eight_schools, Y, SIGMA)
    good = {"mu": 1.0, "tau": 2.0, "z": [0.0] * 8}
    assert torch.allclose(target.unconstrain(good)[:2], torch.tensor([1.0, math.log(2.0)], dtype=torch.float64))
    for wrong, message in [
        ({"mu": 1.0, "tau": 2.0}, "got none for 'z'"),
        ({**good, "z": [0.0] * 7}, r"values\['z'\]: expected shape \(8,\) or \(N, ...\), got \(7,\)"),
        ({**good, "tau": -2.0}, r"values\['tau'\]: expected values in the support"),
        ({**good, "mu": [1.0, 2.0]}, "expected one leading size"),
    ]:
        with pytest.raises(ValueError, match=message):
            target.unconstrain(wrong)


def test_reparametrised_sites_keep_their_names():
    target = PyroModel(poutine.reparam(centred, {"b": LocScaleReparam(0.0)}), FEW)
    assert target.names == ["tau", "b_decentered"] and target.deterministic == ["b"] and list(target.observed) == ["y"]
    x = small(5)
    assert torch.allclose(target.constrain(x)["b"], x[:, :1].exp() * x[:, 1:])


def test_prior_draws_follow_the_prior_and_the_seed():
    target = PyroModel(eight_schools, Y, SIGMA)
    torch.manual_seed(0)
    draws = target.prior(400)
    torch.manual_seed(0)
    assert torch.equal(target.prior(400), draws)
    assert abs(float(draws[:, 0].std()) - 5) < 0.8 and abs(float(draws[:, 2:].std()) - 1) < 0.1


def test_resolve_target_makes_a_model():
    target = resolve_target(eight_schools, Y, SIGMA)
    assert isinstance(target, PyroModel) and resolve_target(target) is target
    with pytest.raises(TypeError, match="args: expected none"):
        resolve_target(target, Y)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 10\), got \(3, 4\)"):
        target.log_prob(torch.zeros(3, 4))
