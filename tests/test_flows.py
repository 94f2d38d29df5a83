"""One table over every recipe: the promises of check_flow; then bases, edges, inverses and wrong use."""

import copy
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vi_flows.flows import recipes
from vi_flows.flows.bases import Mixture, StandardNormal, StudentT
from vi_flows.flows.conditioners.mlp import MLP
from vi_flows.flows.distribution import NotConverged
from vi_flows.flows.inversion import monotone_root, where_converged
from vi_flows.flows.layers.coupling import Coupling, Split
from vi_flows.flows.layers.linear import LU, FullAffine, LowerTriangular, Permutation
from vi_flows.flows.layers.lowrank import Planar, TanhRecurrence
from vi_flows.flows.parameters import Fixed
from vi_flows.flows.univariates.rational_quadratic import RationalQuadratic
from vi_flows.flows.univariates.univariate import Affine, affine
from vi_flows.testing import check_flow
from vi_flows.testing.flow import check_start

VARIANTS = {name: (name, {}) for name in recipes.__all__} | {
    "householder": ("sylvester", {"kind": "householder"}),
    "triangular": ("sylvester", {"kind": "triangular"}),
    "low rank": ("sylvester", {"rank": 2}),
    "permuted spline": ("spline", {"mixing": "permutation"}),
    "unmixed spline": ("spline", {"mixing": "none"}),
    "permuted realnvp": ("realnvp", {"mixing": "permutation"}),
    "student base": ("realnvp", {"base": StudentT}),
    "mixture base": ("planar", {"base": lambda dim: Mixture(torch.randn(3, dim), 0.5)}),
}


def build(variant, dim, context=None):
    name, options = VARIANTS[variant]
    if "base" in options:
        options = options | {"base": options["base"](dim)}
    return getattr(recipes, name)(dim, context, **options)


def perturb(flow, sd):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += sd * torch.randn_like(parameter)
    return flow


def perturbation(variant, dtype):
    return 0.1 if "spline" in variant and dtype == torch.float32 else 0.3


def contexts(size, dtype):
    return None if size is None else torch.randn(4, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("context", [None, 3], ids=["own", "context"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_and_perturbed(variant, context, dtype):
    flow = build(variant, 3, context).to(dtype)
    check_flow(flow, contexts(context, dtype), fresh=True, scales=(1,))
    perturb(flow, perturbation(variant, dtype))
    check_flow(flow, contexts(context, dtype), build=lambda: build(variant, 3, context))


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dims(variant, dim):
    if VARIANTS[variant][1].get("rank", 1) > dim:
        with pytest.raises(ValueError, match="rank: expected at most dim"):
            build(variant, dim, None)
        return
    for context in (None, 2):
        flow = perturb(build(variant, dim, context), 0.1)
        check_flow(flow, contexts(context, torch.float32), scales=(1, 100))


@pytest.mark.parametrize("context", [None, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_near_the_identity(variant, context):
    """Also in 50 dimensions and for 1000 contexts, where a maximum is far out."""
    for dim in (2, 50):
        check_start(build(variant, dim, context))


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "mixture base"])  # whose parameters the base reads
def test_a_distribution_keeps_the_parameters_it_was_built_with(variant, context):
    """What functional_call gives is a distribution of the values put in, with gradients to them, also later."""
    flow = perturb(build(variant, 3, context), 0.1).double()
    other, x = perturb(copy.deepcopy(flow), 0.1), torch.randn(5, 3).double()
    row = None if context is None else torch.randn(context).double()
    values = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    with torch.no_grad():
        expected = other(row).log_prob(x)
    log_q = torch.func.functional_call(flow, values, (row,)).log_prob(x)
    torch.testing.assert_close(log_q, expected)
    assert all(g.any() for g in torch.autograd.grad(log_q.sum(), list(values.values())))


def log_gaussian(x):
    """A correlated normalized Gaussian of any dim."""
    dim = x.shape[-1]
    cov = 0.3 * torch.eye(dim, dtype=x.dtype) + 0.7 + torch.diag(torch.arange(dim, dtype=x.dtype))
    return torch.distributions.MultivariateNormal(torch.ones(dim, dtype=x.dtype), cov).log_prob(x)


def log_banana(x):
    """A normalized banana on R^2."""
    normal = torch.distributions.Normal(0.0, 1.0)
    return normal.log_prob(x[..., 0]) + normal.log_prob((x[..., 1] - x[..., 0] ** 2) / 0.5) - math.log(0.5)


def train(flow, log_p, context=None, steps=150):
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(steps):
        x, log_q = flow(context).rsample_and_log_prob((64,))
        optimizer.zero_grad()
        (log_q - log_p(x)).mean().backward()
        optimizer.step()
    return flow


@pytest.mark.parametrize("variant", VARIANTS)
def test_elbo_stays_below_log_evidence(variant):
    """E_q[log p − log q] <= log Z = 0: a wrong log-determinant would let training push it above."""
    for log_p, dim in ((log_gaussian, 3), (log_banana, 2)):
        slow = variant in ("maf", "spline_autoregressive")
        start = build(variant, dim)
        flow = train(start, log_p, steps=50 if slow else 150).double()
        with torch.no_grad():
            x, log_q = flow().rsample_and_log_prob((4000,))
            log_w = log_p(x) - log_q
        assert log_w.mean() <= 3 * log_w.std() / 4000**0.5 + 1e-9
        assert log_w.mean() > -3.0
    check_flow(flow, scales=(1, 10))


def test_autoregressive_inverse_is_exact():
    """The sweep equals dim full passes, and undoes the forward map."""
    layer = perturb(recipes.iaf(7, 2, layers=1, hidden=(16, 5, 11)), 0.3).double().layers[0]
    bijection, x = layer(torch.randn(5, 2).double()), torch.randn(5, 7).double()
    z = torch.zeros_like(x)
    for _ in range(7):
        z = layer.univariate(bijection.network(z)).inverse_and_logdet(x)[0]
    swept, logdet = bijection.inverse_and_logdet(x)
    again, forward = bijection.forward_and_logdet(swept)
    torch.testing.assert_close(swept, z, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forward, -logdet, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [(3,), (2, 64), (64, 2, 5)])
def test_autoregressive_inverse_of_narrow_networks(hidden):
    """Also where a step completes no hidden unit."""
    flow = perturb(recipes.iaf(6, hidden=hidden), 0.3).double()
    x = torch.randn(4, 6).double()
    z, _ = flow().bijection.inverse_and_logdet(x)
    torch.testing.assert_close(flow().bijection.forward_and_logdet(z)[0], x)


def test_autoregressive_order():
    """Output t of one layer depends on inputs order[:t + 1] only, whatever the context."""
    layer = perturb(recipes.iaf(5, 2, layers=2), 0.3).layers[1]
    bijection = layer(torch.randn(2))
    jacobian = torch.autograd.functional.jacobian(lambda z: bijection.forward_and_logdet(z)[0], torch.randn(5))
    order = list(layer.order)
    assert order == [4, 3, 2, 1, 0]
    assert (jacobian[order][:, order].triu(1) == 0).all()
    assert (jacobian[order][:, order].tril(-1) != 0).sum() == 10


def test_spline_edges():
    """Value and slope are continuous at ±bound, where the slope is 1; the identity outside, exactly."""
    spline = RationalQuadratic(3 * torch.randn(23, 4).double(), 5.0)
    for edge in (-5.0, 5.0):
        near = (edge + 1e-9 * torch.tensor([-1.0, 0.0, 1.0])).double().repeat(4, 1).mT.requires_grad_()
        x, _ = spline.forward_and_logdet(near)
        slope = torch.autograd.grad(x.sum(), near)[0]
        torch.testing.assert_close(x, near, rtol=0, atol=1e-11)
        torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=1e-5)
    outside = torch.tensor([[5.5, -7.0, 1e3, -1e30]]).double()
    for x, logdet in (spline.forward_and_logdet(outside), spline.inverse_and_logdet(outside)):
        assert torch.equal(x, outside) and (logdet == 0).all()


def test_spline_is_continuously_differentiable_at_its_knots():
    spline = RationalQuadratic(2 * torch.randn(23, 1).double(), 5.0)
    knots = 10 * (spline.knots[0, 1:-1] - 0.5)
    below, above = (spline.forward_and_logdet(knots + step) for step in (-1e-10, 1e-10))
    torch.testing.assert_close(below[0], above[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(below[1], above[1], rtol=0, atol=1e-5)


def test_planar_layers_one_by_one():
    """A stack computed in the span of its directions is the layers of eq. 10, one after the other."""
    u, w, b = torch.randn(5, 3).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    stack, z = Planar(u, w, b, layers=5), torch.randn(7, 3).double()
    x, total = z, torch.zeros(7).double()
    for k in range(5):
        tanh = torch.tanh(x @ w[k] + b[k])
        total = total + torch.log1p((1 - tanh**2) * (stack.u_hat[k] @ w[k]))
        x = x + tanh[:, None] * stack.u_hat[k]
    for got, expected in zip(stack.forward_and_logdet(z), (x, total), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("amortized", [False, True])
def test_tanh_recurrence(batch, amortized):
    """Its written-out gradient, once and twice, and row by row under vmap."""
    s = torch.randn(4, *batch).double().requires_grad_()
    full = torch.randn(*(batch if amortized else [1] * len(batch)), 4, 4).double().requires_grad_()

    def recurrence(s, full):
        return TanhRecurrence.apply(s, full.tril(-1).movedim((-2, -1), (0, 1)))

    assert torch.autograd.gradcheck(recurrence, (s, full))
    assert torch.autograd.gradgradcheck(recurrence, (s, full))
    h = torch.zeros_like(s)
    for _ in range(4):  # each pass fixes one more row
        h = torch.tanh(s + (full.tril(-1).movedim((-2, -1), (0, 1)) * h).sum(1))
    torch.testing.assert_close(recurrence(s, full), h)
    if batch == (6,) and not amortized:
        single = torch.vmap(recurrence, (1, None), 1)(s, full[0])
        torch.testing.assert_close(single, h)


@pytest.mark.parametrize("name", ["planar", "spline", "iaf", "spline_autoregressive"])
def test_a_training_step_is_captured(name):
    """make_fx takes loss and gradient of a path-gradient step as one graph, right at other parameters and noise."""
    flow = getattr(recipes, name)(3).double()
    start = {key: value.detach() for key, value in flow.named_parameters()}

    def loss(parameters, noise):
        x, _ = torch.func.functional_call(flow, parameters).from_noise(noise)
        held = {key: value.detach() for key, value in parameters.items()}
        z, logdet = torch.func.functional_call(flow, held).bijection.inverse_and_logdet(x)
        return (flow.base.log_prob(z) + logdet + (x - 1).square().sum(-1)).mean()

    step, noise = torch.func.grad_and_value(loss), torch.randn(5, 3).double()
    graph = make_fx(step)(start, noise)
    other = {key: value + 0.1 * torch.randn_like(value) for key, value in start.items()}
    noise = torch.randn(5, 3).double()
    torch.testing.assert_close(graph(other, noise), step(other, noise))
    leaves = {key: value.clone().requires_grad_() for key, value in other.items()}
    expected = torch.autograd.grad(loss(leaves, noise), list(leaves.values()))
    torch.testing.assert_close(list(graph(other, noise)[0].values()), list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("push", [-1e3, -10.0, 10.0, 1e3])
def test_planar_with_extreme_parameters(dtype, size, push):
    """w tiny or large, u large, towards and against it: finite, log-det > −inf, and inverted."""
    w = size * torch.tensor([0.6, 0.8], dtype=dtype)
    u = push * torch.tensor([0.8, 0.7], dtype=dtype)
    planar = Planar(u[None], w[None], torch.tensor([0.3], dtype=dtype), layers=1)
    z = torch.randn(100, 2, dtype=dtype)
    x, logdet = planar.forward_and_logdet(z)
    back, back_logdet = planar.inverse_and_logdet(x)
    size = torch.finfo(dtype).eps * (1 + x.abs().amax()) * (1 + w.norm()) / (1 + planar.wu_hat).clamp(max=1)
    assert logdet.isfinite().all() and back_logdet.isfinite().all()
    assert (x - planar.forward_and_logdet(back)[0]).abs().max() <= 100 * size * (1 + planar.u_hat.norm() * w.norm())


def test_not_converged_raises_or_is_nan_under_vmap():
    """NaN parameters cannot be inverted: eager log_prob raises, vmap keeps the NaN."""
    flow = recipes.planar(2)
    with torch.no_grad():
        flow.layers[0].own["b"].fill_(math.nan)
    x = torch.randn(5, 2)
    with pytest.raises(NotConverged, match="did not converge at 5 of 5"):
        flow().log_prob(x)
    assert torch.func.vmap(lambda row: flow().log_prob(row))(x).isnan().all()


def test_monotone_root():
    """A wrong bracket is reported; a right one gives root and implicit gradient."""

    def cube(x):
        return x**3 + x, 3 * x**2 + 1

    y = torch.tensor([-10.0, 0.0, 2.0, 300.0], dtype=torch.float64, requires_grad=True)
    root, converged = monotone_root(cube, y, -10 * torch.ones_like(y), 10 * torch.ones_like(y))
    assert converged.all()
    torch.testing.assert_close(cube(root)[0], y)
    torch.testing.assert_close(torch.autograd.grad(root.sum(), y)[0], 1 / cube(root)[1])
    _, converged = monotone_root(cube, y, -torch.ones_like(y), torch.ones_like(y))
    assert converged.tolist() == [False, True, True, False]
    assert where_converged(y, converged).isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_roots_of_saturated_sigmoids(scale, dtype):
    """Far out the tanh is ±1 and the root lies at the very edge of its bracket; steep or nearly flat, it is found."""
    pull = torch.cat(
        [-(1 - torch.rand(10_000, dtype=dtype) ** 4).clamp(max=0.999), 300 * torch.rand(10_000, dtype=dtype)]
    )
    shift, y = (scale * torch.randn(2, 20_000, dtype=dtype)).unbind()

    def f(a):
        tanh = torch.tanh(a + shift)
        return a + pull * tanh, 1 + pull * (1 - tanh * tanh)

    root, converged = monotone_root(f, y, y - pull.abs(), y + pull.abs(), start=-shift)
    assert converged.all()
    assert ((f(root)[0] - y).abs() <= 100 * torch.finfo(dtype).eps * (1 + y.abs() + shift.abs() + pull.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "base",
    [
        StandardNormal(3),
        StudentT(3, df=7.0),
        Mixture(torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]]), 0.5, torch.tensor([0.25, 0.75])),
        Mixture(
            torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]]), (torch.ones(3, 3).tril() + torch.eye(3)).repeat(2, 1, 1)
        ),
        Mixture(torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]]), 0.5, df=7.0),
    ],
    ids=lambda base: type(base).__name__,
)
def test_bases(base, dtype):
    """Moments of the draws, and a density that integrates to one (against a wide t, by importance sampling)."""
    base = base.to(dtype)
    for parameter in base.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    z = base.transform(base.noise((200, 100))).detach().reshape(-1, 3)
    assert z.dtype == dtype
    wide = torch.distributions.StudentT(torch.tensor(3.0, dtype=dtype), 0.5, 3.0)
    points = wide.sample((200_000, 3))
    weight = (base.log_prob(points) - wide.log_prob(points).sum(-1)).exp().detach()
    assert abs(weight.mean() - 1) < 4 * weight.std() / 200_000**0.5
    for power in (1, 2):
        drawn, weighed = z**power, weight[:, None] * points**power
        error = (drawn.mean(0) - weighed.mean(0)).abs()
        se = (drawn.var(0) / len(drawn) + weighed.var(0) / len(weighed)).sqrt()
        assert (error < 4.5 * se).all()


def test_mixture_is_stratified():
    mixture = Mixture(torch.zeros(3, 2), 1.0, torch.tensor([0.2, 0.3, 0.5]))
    noise = mixture.noise((10, 10))
    component = noise[..., 2].reshape(100).long()
    assert (component.bincount() - 100 * mixture.weights).abs().max() <= 1
    assert not torch.equal(component.sort()[0], component)


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("maths", [FullAffine, LU])
def test_linear_is_a_matrix(maths, context):
    flow = perturb(recipes.gaussian(4, context) if maths is FullAffine else recipes.spline(4, context), 0.3).double()
    layer = next(layer for layer in flow.layers if getattr(layer, "maths", None) is maths)
    bijection = layer(None if context is None else torch.randn(context).double())
    zero = torch.zeros(4).double()
    columns = torch.eye(4).double()
    matrix = torch.stack(
        [bijection.forward_and_logdet(c)[0] - bijection.forward_and_logdet(zero)[0] for c in columns], -1
    )
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], bijection.forward_and_logdet(zero)[1])


def test_fixed_layers():
    """Whitening and permutation: constant, moved by .double(), no parameters."""
    shift, scale = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    flow = recipes.diagonal(2).then(Fixed(LowerTriangular, shift=shift, scale_tril=scale)).double()
    flow = flow.then(Fixed(Permutation, index=torch.tensor([1, 0])))
    assert len(list(flow.parameters())) == 1
    check_flow(flow)
    x = flow().sample((20_000,))
    torch.testing.assert_close(x.mean(0), torch.tensor([2.0, 1.0]).double(), atol=0.1, rtol=0)


def test_scales_are_bounded():
    """A raw log-scale of 1e6 stays finite in both directions."""
    affine = Affine(torch.full((2, 3), 1e6), bound=5.0)
    x, logdet = affine.forward_and_logdet(torch.randn(4, 3))
    assert torch.allclose(logdet, torch.tensor(15.0)) and x.isfinite().all()


def test_coupling_changes_only_the_masked():
    layer = perturb(Coupling(Split([True, False, True]), affine(), MLP(1, 2, 2, (8,))), 0.5)
    z = torch.randn(5, 3)
    x, _ = layer().forward_and_logdet(z)
    assert torch.equal(x[:, 1], z[:, 1]) and (x[:, [0, 2]] != z[:, [0, 2]]).all()


WRONG = {
    "dim": lambda: recipes.planar(0),
    "rank": lambda: recipes.sylvester(3, rank=4),
    "kind": lambda: recipes.sylvester(3, kind="dense"),
    "reflections": lambda: recipes.sylvester(3, kind="householder", reflections=0),
    "bins": lambda: recipes.spline(3, bins=1),
    "bound": lambda: recipes.spline(3, bound=-1.0),
    "mixing": lambda: recipes.spline(3, mixing="rotation"),
    "hidden": lambda: recipes.spline(3, hidden=()),
    "base": lambda: recipes.spline(3, base=StandardNormal(2)),
    "context": lambda: recipes.spline(3, 0),
    "df": lambda: StudentT(3, df=0.0),
    "loc": lambda: Mixture(torch.zeros(3)),
    "scale": lambda: Mixture(torch.zeros(2, 3), -1.0),
    "weights": lambda: Mixture(torch.zeros(2, 3), 1.0, torch.tensor([1.0, 0.0])),
} | {
    f"layers {name}": lambda name=name: getattr(recipes, name)(3, layers=0)
    for name in recipes.__all__
    if name not in ("diagonal", "gaussian")
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    with pytest.raises(ValueError, match=f"^{what.split()[0]}: expected [^\n]*$"):
        WRONG[what]()


@pytest.mark.parametrize("name", recipes.__all__)
def test_dims_that_are_no_dims(name):
    for dim in (0, -1, 2.0, "3"):
        with pytest.raises(ValueError, match=r"^dim: expected a positive integer"):
            getattr(recipes, name)(dim)


def test_check_flow_finds_a_wrong_logdet(monkeypatch):
    """The suite itself fails on a wrong log-determinant, a lossy inverse and a parameter without gradient."""
    flow = perturb(recipes.realnvp(3), 0.3).double()
    right = Affine.forward_and_logdet
    monkeypatch.setattr(Affine, "forward_and_logdet", lambda self, z: (right(self, z)[0], 1.001 * right(self, z)[1]))
    with pytest.raises(
        AssertionError, match="forward log-determinant against autograd's Jacobian at inputs of scale 1"
    ):
        check_flow(flow)
    monkeypatch.undo()
    back = Affine.inverse_and_logdet
    monkeypatch.setattr(Affine, "inverse_and_logdet", lambda self, x: (back(self, x)[0] + 1e-6, back(self, x)[1]))
    with pytest.raises(AssertionError, match="round trip"):
        check_flow(flow)
    monkeypatch.undo()
    monkeypatch.setattr(Affine, "forward_and_logdet", lambda self, z: (right(self, z)[0], right(self, z)[1].detach()))
    with pytest.raises(AssertionError, match="gradcheck of the forward map"):
        check_flow(flow)
    monkeypatch.setattr(Affine, "forward_and_logdet", lambda self, z: (right(self, z)[0] * math.nan, right(self, z)[1]))
    with pytest.raises(AssertionError, match="forward value at inputs of scale 1: not finite"):
        check_flow(flow)
    monkeypatch.undo()
    flow.idle = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="gradient of parameter idle through draws: none"):
        check_flow(flow)


@pytest.mark.parametrize("strength", [0.3, 3.0])
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("name", ["iaf", "maf"])
def test_the_inverse_sought_as_a_fixed_point(name, context, strength):
    """Without a graph, in many coordinates: as the sweep, with the Jacobian's log-determinant, or given up for it."""
    flow = perturb(getattr(recipes, name)(50, context, layers=1), strength).double()
    row = None if context is None else torch.randn(context).double()
    layer = flow.layers[0] if name == "iaf" else flow.layers[0].layer
    bijection, x = layer(row), torch.randn(7, 50).double()
    found = bijection.settled(x)
    if strength < 1:
        assert found is not None  # mild coupling: within a third of the passes that are always enough
    with torch.no_grad():
        z, logdet = bijection.inverse_and_logdet(x)
    for got, expected in zip((z, logdet), bijection.swept(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    jacobian = torch.func.jacrev(lambda point: bijection.swept(point[None])[0][0])
    for i in range(2):
        torch.testing.assert_close(logdet[i], jacobian(x[i]).slogdet()[1], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(bijection.forward_and_logdet(z)[0], x, rtol=1e-8, atol=1e-8)
        rows = torch.func.vmap(lambda point: bijection.inverse_and_logdet(point)[0])(x)  # no value can be read there
    torch.testing.assert_close(rows, z, rtol=1e-9, atol=1e-9)
