"""Conditional Gaussians of sparse precision: the flow against autograd, elimination and VI against dense algebra and
closed forms, whole fits of hierarchies against quadrature."""

import copy
import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

import vi_flows as vf
from vi_flows.flows.recursion import Graph
from vi_flows.flows.structured import Features, LeadingTails, StructuredLayer, monomials, rebuilt, structured
from vi_flows.inference.estimate.weights import log_weights
from vi_flows.inference.locate.gaussian import Gaussians, Kind, Origin
from vi_flows.inference.locate.points import start_points
from vi_flows.inference.structured.conditional import Conditional
from vi_flows.inference.structured.locate import Marginal, degree_of, like, locate_structured, split
from vi_flows.inference.structured.regressed import around
from vi_flows.inference.structured.sparsity import coloured, curvature, elimination, influence, pattern, probing
from vi_flows.running import Clock
from vi_flows.testing import check_flow


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def chain(n):
    at = torch.arange(n)
    return (at[:, None] - at).abs() <= 1


def blocks(n):
    at = torch.arange(n) // 3
    return at[:, None] == at


def crossed(n):
    side = torch.arange(n) % 2
    return (side[:, None] != side) | torch.eye(n, dtype=torch.bool)


def arrow(n):
    found = chain(n)
    found[n // 2], found[:, n // 2] = True, True
    return found


def dense(n):
    return torch.ones(n, n, dtype=torch.bool)


def grid(n):
    side = math.isqrt(n)
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()) <= 1


PATTERNS = [chain, blocks, crossed, arrow, dense, grid]


def precision_of(found):
    """A random positive matrix of a pattern."""
    n = len(found)
    matrix = torch.randn(n, n, dtype=torch.float64)
    matrix = torch.where(found, matrix + matrix.mT, 0.0)
    return matrix + torch.diag(matrix.abs().sum(-1) + 0.5)


def quadratic(matrix, scale_of_first=0.0):
    """log p of N(0, P⁻¹) over all but the first coordinate t, whose e^{ct} multiplies P, which is N(0, 1)."""

    def log_prob(x):
        t, u = x[:, 0], x[:, 1:]
        half = torch.einsum("ni,ij,nj->n", u, matrix, u) * (scale_of_first * t).exp()
        return -0.5 * t.square() - 0.5 * half + 0.5 * len(matrix) * scale_of_first * t

    return vf.LogDensity(log_prob, 1 + len(matrix))


def random_flow(few=2, n=6, degree=2, dtype=torch.float64):
    _, parents, depth = elimination(arrow(n))
    by_depth = sorted(range(n), key=lambda k: depth[k])
    place = {old: new for new, old in enumerate(by_depth)}
    pairs = torch.tensor([(place[k], place[j]) for k in by_depth for j in parents[k]])
    index = torch.randperm(few + n)
    graph = Graph(index[:few], index[few:], pairs[:, 0], pairs[:, 1], torch.tensor([depth[k] for k in by_depth]))
    features = Features(torch.tensor(monomials(few, degree)))
    tril = torch.eye(few) + 0.3 * torch.ones(few, few).tril(-1)
    layer = StructuredLayer(graph, features, torch.randn(few), tril, torch.randn(n), 0.5 + torch.rand(n))
    return structured(layer).to(dtype)


@pytest.mark.parametrize("few", [1, 2, 3])
def test_the_flow_keeps_every_promise(few):
    flow = random_flow(few)
    for p in flow.parameters():
        p.data += 0.3 * torch.randn_like(p)
    check_flow(flow, scales=(1.0, 3.0), build=lambda: rebuilt(flow.state_dict()))


def test_path_scores_are_gradients_of_the_density():
    flow = random_flow()
    for p in flow.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, log_q = flow().from_noise(flow.base.noise((5,)), path=True)
    held = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(flow().log_prob(held).sum(), held)
    (found,) = torch.autograd.grad(log_q.sum(), x)
    torch.testing.assert_close(found, score)


@pytest.mark.parametrize("shape", PATTERNS)
def test_the_recursion_solves_and_has_gradients(shape):
    """δ = (I − B)⁻¹ e by dense algebra, where levels have one width and several; its gradients by differences."""
    _, parents, depth = elimination(shape(9))
    by_depth = sorted(range(9), key=lambda k: depth[k])
    place = {old: new for new, old in enumerate(by_depth)}
    pairs = torch.tensor([(place[k], place[j]) for k in by_depth for j in parents[k]])
    child, parent = pairs.unbind(-1)
    graph = Graph(torch.tensor([0]), torch.arange(1, 10), child, parent, torch.tensor([depth[k] for k in by_depth]))
    b, e = torch.randn(3, len(child)).double(), torch.randn(3, 9).double()
    kept = torch.eye(9, dtype=torch.float64).repeat(3, 1, 1)
    kept[:, child, parent] = -b
    torch.testing.assert_close(graph.solve(b, e), torch.linalg.solve(kept, e))
    torch.testing.assert_close(graph.solve(b[0], e), torch.linalg.solve(kept[0], e.mT).mT)
    torch.testing.assert_close(graph.transposed(b, e), (kept.mT @ e[..., None])[..., 0])
    assert torch.autograd.gradcheck(graph.solve, (b.requires_grad_(), e.requires_grad_()))


def test_features_are_what_their_exponents_say():
    """Products of Hermite polynomials of a bounded t; or, where that is alone, t and √(1 + t²), linear far out."""
    features = Features(torch.tensor(monomials(2, 3)))
    t = torch.linspace(-2, 2, 14, dtype=torch.float64).reshape(7, 2)
    first, second = (3 * torch.tanh(t / 3)).unbind(-1)
    exponents = [tuple(row) for row in features.exponents.tolist()]
    assert len(exponents) == len(set(exponents)) == 10
    near, far = features(t)
    same = {(0, 0): 0 * first + 1, (1, 1): first * second, (3, 0): (first**3 - 3 * first) / 6**0.5}
    same |= {(2, 1): (first**2 - 1) / 2**0.5 * second}
    for powers, value in same.items():
        for phi in (near, far):
            torch.testing.assert_close(phi[:, exponents.index(powers)], value)
    torch.testing.assert_close(near[:, exponents.index((0, 2))], (second**2 - 1) / 2**0.5)
    torch.testing.assert_close(far[:, exponents.index((1, 0))], t[:, 0])
    bowl = ((1 + t[:, 1] ** 2).sqrt() - 1.3545) / 0.4065
    torch.testing.assert_close(far[:, exponents.index((0, 2))], bowl, atol=1e-3, rtol=1e-3)
    near, far = features(torch.tensor([[30.0, 0.0], [31.0, 0.0], [32.0, 0.0]]).double())
    assert (near[2] - near[0]).abs().max() < 1e-6
    assert (far[2] - 2 * far[1] + far[0]).abs().max() < 1e-3 < (far[1] - far[0]).abs().max()
    assert all(math.comb(d + degree_of(d), d) <= 36 or degree_of(d) == 1 for d in range(1, 50))


def test_heavy_tails_of_the_few_alone():
    base = LeadingTails(5, 2).double()
    z = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(z), vf.flows.bases.StandardNormal(5).log_prob(z))
    heavy = base.heavy(4.0)
    rest = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 2:]).sum(-1)
    torch.testing.assert_close(heavy.log_prob(z), vf.flows.bases.StudentT(2, 4.0).log_prob(z[:, :2]) + rest)
    wide = heavy.noise((20_000,)).abs()
    assert (wide[:, :2] > 6).double().mean() > 1e-3 and wide[:, 2:].max() < 6


def test_the_heavier_base_is_not_bent_by_the_layers_over_the_few():
    flow = copy.deepcopy(random_flow())
    heavy, over = flow.base.heavy(4.0), flow.layers[0]()
    t, z = LeadingTails(8, 2, 4.0).double(), heavy.noise((20_000,))
    image, logdet = over.forward_and_logdet(z)
    assert (image - z)[:, :2].abs().max() > 0.1  # the layers do something
    torch.testing.assert_close(heavy.log_prob(z), t.log_prob(image) + logdet)
    shares = torch.tensor([0.05, 0.5, 0.95]).double()
    points = torch.tensor([-2.1318, 0.0, 2.1318]).double()  # of a t of four degrees of freedom
    assert ((image[:, :1] <= points).double().mean(0) - shares).abs().max() < 0.015
    assert flow.base.over[0] is flow.layers[0]


@pytest.mark.parametrize("shape", PATTERNS)
def test_elimination_factors_without_missing_entries(shape):
    """(I − B)⁻¹ S² (I − B)⁻ᵀ is the inverse of the precision, whose entries probing has found."""
    found = shape(16)
    matrix = precision_of(found)
    n = len(matrix)
    of = torch.ones(n + 1, n + 1, dtype=torch.bool)
    of[1:, 1:] = found
    inside = Conditional(quadratic(matrix), of, torch.tensor([0]), 0.5 + torch.rand(n + 1, dtype=torch.float64))
    eta, u = torch.zeros(2, 1).double(), torch.randn(2, n).double()
    b, log_s = inside.factor(*inside.precision(eta, u[:, None]))
    rows = inside.spread(b[:1], log_s[:1], torch.eye(n).double()) * inside.unit
    order = inside.graph.many - 1
    torch.testing.assert_close(rows.mT @ rows, torch.linalg.inv(matrix)[order][:, order], atol=1e-6, rtol=1e-5)
    grad = torch.randn(2, n).double()
    step = inside.newton_step(b, log_s, grad) * inside.unit
    torch.testing.assert_close(step, grad / inside.unit @ (rows.mT @ rows))
    at, _, _ = inside.laplace(eta, u, 3)
    assert at.abs().max() < 1e-6


def test_chains_are_shallow_and_sparse():
    order, parents, depth = elimination(chain(1000))
    assert sorted(order) == list(range(1000))
    assert max(depth) < 14 and sum(map(len, parents)) < 2200


@pytest.mark.parametrize("shape", PATTERNS)
def test_colours_tell_entries_apart(shape):
    found = shape(16)
    near = coloured(found, 1)
    off = found & ~torch.eye(len(found), dtype=torch.bool)
    assert not bool((near[:, None] == near)[off].any())
    colours, hub = probing(found)
    assert int(colours.max()) + 1 <= len(found)
    matrix = precision_of(found)
    product = matrix @ torch.nn.functional.one_hot(colours).to(matrix)
    for i, j in found.nonzero().tolist():
        if hub[i] and not hub[j]:
            continue  # read from the other side
        torch.testing.assert_close(product[i, colours[j]], matrix[i, j]) if not hub[i] or hub[j] else None


def poisson(counts):
    """t ~ N(0, 1); log p(u | t) = Σ a u − e^u: the best Gaussian has m + s²/2 = log a and s⁻² = a."""
    return vf.LogDensity(lambda x: -0.5 * x[:, 0].square() + (counts * x[:, 1:] - x[:, 1:].exp()).sum(-1), 41)


def test_gaussian_vi_of_the_many_solves_its_equations():
    counts = torch.linspace(5, 20, 40, dtype=torch.float64)
    of = torch.eye(41, dtype=torch.bool)
    inside = Conditional(poisson(counts), of, torch.tensor([0]), torch.ones(41).double())
    eta = torch.zeros(64, 1).double()
    start = inside.laplace(eta, torch.zeros(64, 40).double(), 20)
    u, _, log_s = inside.variational(eta, *start, pairs=4, rounds=5)
    a = counts[inside.graph.many - 1]
    assert ((u.mean(0) + 1 / (2 * a) - a.log()) * a.sqrt()).abs().max() < 0.03
    assert ((-2 * log_s).exp().mean(0) / a - 1).abs().max() < 0.03


def hierarchy(groups):
    """y_g ~ N(θ_g, 1), θ_g ~ N(μ, τ), μ ~ N(0, 5), τ ~ HalfNormal(2): the model, and log Z, E[log τ] by quadrature."""
    y = 1 + 0.7 * torch.randn(groups, dtype=torch.float64) + torch.randn(groups, dtype=torch.float64)

    def model():
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("g", groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    log_tau = torch.linspace(-7, 3, 2001, dtype=torch.float64)
    tau = log_tau.exp()
    normal = torch.distributions.MultivariateNormal
    eye, ones = torch.eye(groups).double(), torch.ones(groups, groups).double()
    each = torch.stack([normal(torch.zeros(groups).double(), eye * (1 + t * t) + 25 * ones).log_prob(y) for t in tau])
    each = each + torch.distributions.HalfNormal(2.0).log_prob(tau) + log_tau
    return model, each, log_tau


def test_the_marginal_of_the_few_is_exact_where_the_many_are_gaussian():
    model, each, log_tau = hierarchy(40)
    target = vf.PyroModel(model)
    found = split(target, start_points(target))
    few = found.inside.graph.few.tolist()
    assert few == [1]  # log τ: μ and θ are Gaussian given it
    value, grad = Marginal(found.inside).value_and_grad(log_tau[400:2000:100, None])
    torch.testing.assert_close(value, each[400:2000:100], atol=1e-3, rtol=0)
    slope = (each[401:2001:100] - each[399:1999:100]) / (log_tau[2] - log_tau[0])
    torch.testing.assert_close(grad[:, 0], slope, atol=1e-2, rtol=1e-3)


def test_a_start_is_all_but_exact_for_a_gaussian_hierarchy():
    model, each, log_tau = hierarchy(60)
    log_z = float(each.logsumexp(0) + (log_tau[1] - log_tau[0]).log())
    target = vf.PyroModel(model)
    found = locate_structured(target)
    assert found.variance < 0.5 and len(found.probes) > 5
    weights = log_weights(found.flow.requires_grad_(False), target, 2000)
    assert abs(float(weights.log_w.logsumexp(0)) - math.log(2000) - log_z) < 0.03
    assert log_z - 0.2 < float(weights.log_w.median()) < log_z + 0.2
    near = like(found.flow)
    draws = found.flow().rsample((4000,)).detach()
    assert ((draws.mean(0) - near.loc[0]) / draws.std(0)).abs().max() < 0.6


def test_a_fit_of_a_centred_hierarchy(tmp_path):
    model, each, log_tau = hierarchy(40)
    log_z = float(each.logsumexp(0) + (log_tau[1] - log_tau[0]).log())
    posterior = vf.fit(model, flow="structured", progress=False)
    assert posterior.verdict.status in ("reliable", "corrected")
    assert abs(posterior.log_evidence - log_z) < 0.02
    tau = posterior.sample(20_000)["tau"].log().sort().values
    below = each.softmax(0).cumsum(0)
    for level in (0.05, 0.5, 0.95):
        exact = float(below[int((log_tau < tau[int(level * 20_000)]).sum())])
        assert abs(exact - level) < 0.03
    again = vf.load(posterior.save(tmp_path / "fit.safetensors"), vf.PyroModel(model))
    x = posterior.flow().rsample((5,))
    torch.testing.assert_close(again.flow().log_prob(x), posterior.flow().log_prob(x))


def test_a_gaussian_becomes_a_structured_flow():
    """The precision of θ given τ is sparse, and that of a Gaussian near it: then the flow is that Gaussian."""

    def density(x):
        tau, theta = x[..., 0], x[..., 1:]
        return -0.5 * (tau**2 + (theta * torch.exp(-tau)[..., None]).square().sum(-1) + (theta - 1).square().sum(-1))

    precision = torch.diag(torch.linspace(2, 10, 41)).double()
    precision[0, 1:] = precision[1:, 0] = torch.linspace(-0.3, 0.3, 40)
    law = torch.distributions.MultivariateNormal(torch.linspace(-1, 1, 41).double(), precision_matrix=precision)
    flow = around(vf.LogDensity(density, 41), Gaussians(law.loc[None], law.scale_tril[None], (Origin(Kind.END),)))
    layer = flow.layers[1]
    assert layer.graph.few.tolist() == [0]
    x = law.sample((20,))
    z, logdet = layer().inverse_and_logdet(x)
    found = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + logdet
    torch.testing.assert_close(found, law.log_prob(x), atol=1e-2, rtol=0)
    assert (
        around(vf.LogDensity(law.log_prob, 41), Gaussians(law.loc[None], law.scale_tril[None], (Origin(Kind.END),)))
        is None
    )


def test_nothing_to_split():
    correlated = vf.LogDensity(lambda x: -0.5 * x.square().sum(-1) - 0.1 * x.sum(-1).square(), 40)
    assert locate_structured(correlated) is None
    with pytest.raises(ValueError, match="structured"):
        vf.fit(correlated, flow="structured", progress=False)


def test_many_local_scales_are_not_few():
    """A regularised horseshoe: each of 20 coefficients has a scale of its own, and is not Gaussian given eight."""
    design = torch.randn(60, 20, dtype=torch.float64)
    y = design[:, :3].sum(-1) + torch.randn(60, dtype=torch.float64)

    def horseshoe():
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        scale = tau[..., None] * pyro.sample("scale", dist.HalfCauchy(torch.ones(20)).to_event(1))
        beta = pyro.sample("beta", dist.Normal(0.0, scale / (1 + scale.square() / 4).sqrt()).to_event(1))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal((design @ beta[..., None])[..., 0], 1.0), obs=y)

    target = vf.PyroModel(horseshoe)
    assert split(target, start_points(target)) is None


def test_no_more_than_is_asked_for_when_time_is_up():
    """What is quick goes on under "auto"; a user who asked for it is given a structured flow, if a poor one."""
    target, clock = vf.PyroModel(hierarchy(40)[0]), Clock(1e-3)
    with clock.ending("locating", 0.4):
        time.sleep(1e-3)
        assert locate_structured(target, asked=False) is None
        assert locate_structured(target) is not None


def test_curvature_finds_a_pattern():
    matrix = precision_of(arrow(12))
    target = quadratic(matrix, 1.0)
    found = curvature(target, torch.ones(13).double(), torch.full((13,), 1e-4).double())
    torch.testing.assert_close(found[1:, 1:], matrix * math.e, rtol=1e-5, atol=1e-5)
    seen = pattern([found])
    assert bool(seen[0].all()) and torch.equal(seen[1:, 1:], arrow(12))


def test_influences_of_some_are_those_among_all():
    target = quadratic(precision_of(arrow(12)), 1.0)
    x, steps = torch.ones(13).double(), torch.full((13,), 0.3).double()
    curved = curvature(target, x, torch.full((13,), 1e-4).double())
    every, some = (influence(target, x, curved, pattern([curved]), steps, i) for i in (None, torch.tensor([0, 5])))
    torch.testing.assert_close(every[0], torch.tensor(12 * 0.3**2).double(), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(some[[0, 5]], every[[0, 5]])
    assert some.count_nonzero() <= 2
