"""Flows of one's own from public names: maps, conditioners, splits, layers that look at data, and exactness."""

import re

import pytest
import torch
from torch import nn

import vi_flows as vf
from vi_flows.flows import (
    MLP,
    Autoregressive,
    Bijection,
    Chain,
    Compose,
    Conditioner,
    Coupling,
    Fixed,
    Flow,
    Inverse,
    Inverted,
    Layer,
    MaskedMLP,
    Parametric,
    Split,
    Univariate,
    affine,
)
from vi_flows.flows.bijection import Leading, LeadingLayers
from vi_flows.flows.conditioners.conditioner import Swept
from vi_flows.flows.distribution import exact
from vi_flows.flows.layers.linear import LowerTriangular
from vi_flows.vae.model import Architecture, build
from vi_flows.vae.refine import refine
from vi_flows.vae.training import parameter_groups


def perturb(module, sd=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += sd * torch.randn_like(parameter)
    return module


def normal(*layers, context=None, dim=3):
    return Flow(layers, vf.bases.StandardNormal(dim), context)


# --- a flow of one's own: NICE


class Shift(Bijection):
    """x = z + t."""

    def __init__(self, raw):
        self.shift = raw.squeeze(-2)

    def forward_and_logdet(self, z):
        return z + self.shift, torch.zeros_like(z).sum(-1)

    def inverse_and_logdet(self, x):
        return x - self.shift, torch.zeros_like(x).sum(-1)


def nice(dim, context=None):
    """Additive couplings, closed by an elementwise affine layer (Dinh et al. 2015)."""
    layers = []
    for i in range(3):
        split = Split([j % 2 == i % 2 for j in range(dim)])
        shift = Univariate(1, Shift)
        layers.append(Coupling(split, shift, MLP(split.kept, split.changed, shift.count, (16,), context)))
    return normal(*layers, Parametric(affine(), dim, context), context=context, dim=dim)


@pytest.mark.parametrize("context", [None, 2])
def test_nice_from_public_names(context):
    rows = None if context is None else torch.randn(4, context).double()
    vf.testing.check_flow(nice(3, context).double(), rows, fresh=True)
    flow = perturb(nice(3, context)).double()
    vf.testing.check_flow(flow, rows, build=lambda: nice(3, context))
    z = torch.randn(4, 3).double()
    assert not Compose([layer(rows) for layer in flow.layers[:3]]).forward_and_logdet(z)[1].any()


# --- a univariate with parameters of its own


class Leaking(Bijection):
    """x = z + (e^a − 1) softplus(z) + t: slope 1 on the left, e^a on the right; its inverse by Newton's method."""

    def __init__(self, raw, steep):
        self.shift, self.gain = raw.squeeze(-2), steep.exp() - 1

    def forward_and_logdet(self, z):
        slope = 1 + self.gain * torch.sigmoid(z)
        return z + self.gain * nn.functional.softplus(z) + self.shift, slope.log().sum(-1)

    def inverse_and_logdet(self, x):
        z = x - self.shift
        for _ in range(30):
            value, slope = z + self.gain * nn.functional.softplus(z) + self.shift, 1 + self.gain * torch.sigmoid(z)
            z = z - (value - x) / slope
        return z, -(1 + self.gain * torch.sigmoid(z)).log().sum(-1)


class Leaky(Univariate):
    """The steepness is one number for all coordinates, learned with the flow."""

    def __init__(self):
        super().__init__(1)
        self.steep = nn.Parameter(torch.tensor(0.01))

    def bind(self):
        steep = self.steep
        return lambda raw: Leaking(raw, steep)


def of_leaky(kind, context=None):
    if kind == "own":
        layer = Parametric(Leaky(), 3, context)
    elif kind == "coupling":
        layer = Coupling(Split([True, False, True]), Leaky(), MLP(1, 2, 1, (8,), context))
    elif kind == "chain":
        chain = Chain(affine(2.5), Leaky())
        layer = Coupling(Split([True, False, True]), chain, MLP(1, 2, chain.count, (8,), context))
    else:
        layer = Autoregressive(Leaky(), MaskedMLP((2, 0, 1), 1, (8,), context))
    return normal(layer, Parametric(affine(), 3, context), context=context)


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("kind", ["own", "coupling", "chain", "autoregressive"])
def test_a_univariate_with_parameters(kind, context):
    flow = perturb(of_leaky(kind, context)).double()
    assert sum(name.endswith("steep") for name, _ in flow.named_parameters()) == 1
    rows = None if context is None else torch.randn(4, context).double()
    vf.testing.check_flow(flow, rows, build=lambda: of_leaky(kind, context), scales=(1, 10))
    values = {name: torch.zeros_like(p) for name, p in flow.named_parameters()}  # held, also after the call
    q, x = torch.func.functional_call(flow, values, (rows,)), torch.randn(4, 3).double()
    torch.testing.assert_close(q.log_prob(x), flow.base.log_prob(x))


# --- a conditioner of one's own, which has no sweeps


class Earlier(Conditioner):
    """raw_i = W_i tanh(z_<i) + V_i context: a linear conditioner in the natural order."""

    def __init__(self, dim, count, context=None):
        super().__init__(dim, dim, count, order=range(dim))
        self.weight = nn.Parameter(1e-3 * torch.randn(count, dim, dim))
        self.own = nn.Parameter(1e-3 * torch.randn(count, dim))
        self.of_context = None if context is None else nn.Parameter(1e-3 * torch.randn(count, dim, context))

    def forward(self, context=None):
        weight = self.weight.tril(-1)
        own = self.own if context is None else torch.einsum("cdk,...k->...cd", self.of_context, context) + self.own
        return lambda z: torch.einsum("cij,...j->...ci", weight, z.tanh()) + own


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("way", ["as it is", "inverted"])
def test_a_conditioner_without_sweeps(way, context):
    def made():
        layer = Autoregressive(affine(2.5), Earlier(3, 2, context))
        return normal(
            Inverted(layer) if way == "inverted" else layer, Parametric(affine(), 3, context), context=context
        )

    rows = None if context is None else torch.randn(4, context).double()
    vf.testing.check_flow(made().double(), rows, fresh=True, scales=(1,))
    flow = perturb(made()).double()
    vf.testing.check_flow(flow, rows, build=made)
    # the path gradient's score is that of log q
    noise = flow.base.noise((4,))
    x, log_q = flow(rows).from_noise(noise, path=True)
    (score,) = torch.autograd.grad(log_q.sum(), x, retain_graph=True)
    held = x.detach().requires_grad_()
    torch.testing.assert_close(score, torch.autograd.grad(flow(rows).log_prob(held).sum(), held)[0])


class Unswept(MaskedMLP):
    """The same network as a function, which cannot be swept."""

    def forward(self, context=None):
        network = super().forward(context)
        return lambda z: network(z)


@pytest.mark.parametrize("dim", [3, 20])  # fixed points are sought from 16 on
def test_sweeps_are_whole_passes(dim):
    conditioner = perturb(MaskedMLP(range(dim), 2, (16, 9), 2)).double()
    other = Unswept(range(dim), 2, (16, 9), 2).double()
    other.load_state_dict(conditioner.state_dict())
    context, z = torch.randn(4, 2).double(), torch.randn(5, 4, dim).double().requires_grad_()
    swept, whole = (Autoregressive(affine(2.5), each)(context) for each in (conditioner, other))
    assert isinstance(swept.network, Swept) and not isinstance(whole.network, Swept)
    for name, inputs in (("inverse_and_logdet", (z,)), ("forward_and_score", (z, -z.detach()))):
        torch.testing.assert_close(getattr(swept, name)(*inputs), getattr(whole, name)(*inputs))
    with torch.no_grad():
        torch.testing.assert_close(swept.inverse_and_logdet(z), whole.inverse_and_logdet(z))


def test_what_a_vae_asks_of_a_conditioner():
    """Rates are 1 by default; a posterior that cannot take its context in is not refined, and says what is missing."""
    vae = build(Architecture((1, 4, 4), 3, posterior="iaf", network_options={"hidden": (8,)}))
    width = vae.posterior.context
    layer = Autoregressive(affine(2.5), Earlier(3, 2, width))
    vae.posterior = normal(layer, Parametric(affine(), 3, width), context=width)
    factors = {id(p): group["factor"] for group in parameter_groups(vae, 0.1) for p in group["params"]}
    assert factors[id(layer.conditioner.weight)] == 1.0
    assert factors[id(vae.posterior.layers[1].weight)] == pytest.approx(width**0.5)
    with pytest.raises(TypeError, match=r"^fold: expected Earlier to put a context into its parameters[^\n]*$"):
        refine(vae, torch.bernoulli(torch.full((2, 16), 0.4)), steps=1)


@pytest.mark.parametrize("conditioner", [lambda: MLP(2, 3, 2, (8, 7), 4), lambda: MaskedMLP((2, 0, 1), 2, (8, 7), 4)])
def test_a_folded_conditioner_is_what_it_was_at_its_contexts(conditioner):
    made, contexts = perturb(conditioner()), torch.randn(5, 4)
    z = torch.randn(5, made.inputs)
    parameters = made.fold(contexts)
    for i in range(5):
        own = {name: value[i] for name, value in parameters.items()}
        network = torch.func.functional_call(made, own, (torch.zeros(4),))
        torch.testing.assert_close(network(z[i]), made(contexts[i])(z[i]))
    assert MLP(2, 3, 2, (8,)).fold(contexts) == {}


# --- splits


def test_a_split_is_parts_and_join():
    split, x = Split([True, False, True, False, False]), torch.randn(4, 5)
    keep, change = split.parts(x)
    assert torch.equal(keep, x[:, [1, 3, 4]]) and torch.equal(change, x[:, [0, 2]])
    assert (split.kept, split.changed) == (3, 2) and torch.equal(split.join(keep, change), x)
    broadcast = split.join(keep[0], change)
    assert torch.equal(broadcast[:, [1, 3, 4]], keep[0].expand(4, 3)) and torch.equal(broadcast[:, [0, 2]], change)


WRONG = {
    "mask of indices": lambda: Split([0, 2]),
    "mask that changes nothing": lambda: Split([False, False]),
    "mask of two axes": lambda: Split([[True, False]]),
    "conditioner of other sizes": lambda: Coupling(Split([True, False]), affine(), MLP(1, 1, 3, (8,))),
    "conditioner without order": lambda: Autoregressive(affine(), MLP(3, 3, 2, (8,))),
    "conditioner whose order is none": lambda: Autoregressive(affine(), MaskedMLP((0, 2, 2), 2, (8,))),
    "count": lambda: Univariate(0, Shift),
    "hidden": lambda: MaskedMLP((0, 1), 2, (0,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    with pytest.raises(ValueError, match=f"^{what.split()[0]}: expected [^\n]*$"):
        WRONG[what]()


def test_a_univariate_without_a_map():
    with pytest.raises(TypeError, match=r"^build: expected [^\n]*$"):
        Univariate(2)(torch.zeros(2, 3))


# --- layers that look at data once


class Standardising(Layer):
    """x = loc + scale z, with the mean and sd of the data that it has seen (as ActNorm's first batch)."""

    def __init__(self, dim):
        super().__init__()
        self.seen = []
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def initialise(self, x, context=None, inverted=False):
        self.seen.append((x, inverted))
        mean, sd = x.mean(0), x.std(0)
        self.loc, self.scale = (-mean / sd, 1 / sd) if inverted else (mean, sd)

    def forward(self, context=None):
        return LowerTriangular(self.loc, torch.diag(self.scale))


def standard(x):
    return bool((x.mean(0).abs() < 1e-9).all() and ((x.std(0) - 1).abs() < 1e-9).all())


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("wrap", [lambda layer: layer, Inverted, lambda layer: Inverted(Inverted(layer))])
def test_layers_look_at_data_in_their_own_coordinates(wrap, context):
    """Whatever lies above, and either way round, a layer sees what reaches it and standardises what it passes on."""
    looking = [Standardising(3), Standardising(3)]
    mixing = [perturb(Parametric(affine(), 3, context)), perturb(vf.recipes.gaussian(3, context).layers[0])]
    flow = normal(wrap(looking[0]), mixing[0], wrap(looking[1]), mixing[1], context=context).double()
    x = 3 + torch.randn(200, 3).double() @ torch.randn(3, 3).double()
    rows = None if context is None else torch.randn(200, context).double()
    flow.initialise(x, rows)
    with torch.no_grad():
        z, _ = flow(rows).bijection.inverse_and_logdet(x)
        above, _ = mixing[1](rows).inverse_and_logdet(x)
        between, _ = wrap(looking[1])(rows).inverse_and_logdet(above)
    assert torch.equal(looking[1].seen[0][0], above) and standard(between) and standard(z)
    assert [len(layer.seen) for layer in looking] == [1, 1]
    assert all(inverted == (wrap is Inverted) for layer in looking for _, inverted in layer.seen)


def test_layers_of_leading_coordinates_look_at_these():
    first = Standardising(2)
    inner = Standardising(2)
    flow = normal(LeadingLayers([inner, Inverted(perturb(Parametric(affine(), 2))), first], 2)).double()
    x = 5 + 2 * torch.randn(100, 3).double()
    flow.initialise(x)
    z, _ = flow().bijection.inverse_and_logdet(x)
    assert torch.equal(first.seen[0][0], x[:, :2]) and standard(z[:, :2]) and torch.equal(z[:, 2], x[:, 2])


def test_most_flows_do_not_look():
    flow = vf.recipes.spline(3)
    before = [p.clone() for p in flow.parameters()]
    flow.initialise(torch.randn(10, 3))
    assert all(torch.equal(p, was) for p, was in zip(flow.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(5, 2), "x: expected finite rows of shape (N, 3), got shape (5, 2)"),
        (torch.randn(3), "x: expected finite rows of shape (N, 3), got shape (3,)"),
        (torch.full((2, 3), torch.nan), "x: expected finite rows of shape (N, 3), got shape (2, 3) with 6 values"),
        (torch.randn(5, 3).double(), "x: expected torch.float32"),
    ],
    ids=["size", "one row", "nan", "precision"],
)
def test_data_that_no_flow_can_look_at(x, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}[^\n]*$"):
        vf.recipes.spline(3).initialise(x)
    with pytest.raises(ValueError, match=r"^context: expected None"):
        vf.recipes.spline(3).initialise(torch.randn(5, 3), torch.randn(5, 2))


# --- log-determinants that are estimates


class Probed(Layer):
    """x = W z, its log-determinant exact in eval mode if it can be, else with a probe drawn at the call."""

    def __init__(self, can=True):
        super().__init__()
        self.can = can

    def forward(self, context=None):
        return Estimated(torch.eye(3).double(), None if self.can and not self.training else torch.randn(3).double())


class Estimated(LowerTriangular):
    def __init__(self, tril, probe):
        super().__init__(torch.zeros(3).double(), tril)
        self.probe, self.exact = probe, probe is None

    def logdet(self):
        return super().logdet() if self.exact else super().logdet() + self.probe.sum()


def test_an_estimate_is_a_pure_function_and_known_as_one():
    q = normal(Probed(), Probed()).double()()
    z = torch.randn(5, 3).double()
    assert torch.equal(q.bijection.forward_and_logdet(z)[1], q.bijection.forward_and_logdet(z)[1])
    rough, sure = Probed()(), Probed().eval()()
    assert not rough.exact and sure.exact and Compose([]).exact
    assert Compose([sure, sure]).exact and not Compose([sure, rough]).exact and not Compose([Compose([rough])]).exact
    assert Inverse(sure).exact and not Inverse(rough).exact and not Leading(rough, 3).exact


@pytest.mark.parametrize("context", [None, 2])
def test_only_exact_flows_are_judged(context):
    affinely = Parametric(affine(), 3, context)
    flow = normal(affinely, Probed(), context=context).double()
    rows = None if context is None else torch.zeros(context).double()
    assert not flow(rows).bijection.exact and exact(flow) is flow and flow(rows).bijection.exact
    for layer, name in ((Probed(False), "Probed"), (Inverted(Probed(False)), "Inverted")):
        said = rf"^flow: expected exact log-determinants in judging, got estimates from layer 1, {name}; [^\n]*$"
        with pytest.raises(ValueError, match=said):
            exact(normal(affinely, layer, context=context).double())


@pytest.mark.parametrize("name", vf.recipes.__all__)
def test_every_recipe_is_exact(name):
    whitening = Fixed(LowerTriangular, shift=torch.zeros(3), scale_tril=torch.eye(3))
    for context in (None, 2):
        exact(getattr(vf.recipes, name)(3, context).then(whitening))
