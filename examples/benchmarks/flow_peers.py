"""The same flows in vi_flows and in its peers, as :class:`Model`: parameters, draws with log q, and log densities.

Matched everywhere: layers per family (LAYERS), conditioners of hidden widths HIDDEN, BINS pieces on ±BOUND, a fixed
standard normal base, no layers in between but permutations, which peers that always change the same half need.

Not matched, each package keeping its own:
    activations (ours SiLU, most ReLU, torchflows tanh), bounds of scales and slopes, initial values;
    planar and radial in torchflows have other formulas (a sigmoid; no constraint that keeps the map invertible);
    Sylvester: ours has min(D, 8) columns by QR, Pyro min(D, 8) of its reflections (and a log-determinant that is right
    only at its start), torchflows an identity with D/2 columns;
    radial in torchflows has a wrong log-determinant;
    nflows and normflows have a ReLU after the second masked layer only, and their affine scale is a sigmoid;
    Pyro's spline slopes at the edges are 1 − 1e-3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vi_flows as vf
from vi_flows.flows import MLP, Autoregressive, Coupling, Flow, MaskedMLP, Split
from vi_flows.flows.univariates.rational_quadratic import rational_quadratic

LAYERS = {
    "planar": 8,
    "radial": 8,
    "sylvester": 4,
    "realnvp": 6,
    "spline": 4,
    "iaf": 4,
    "maf": 4,
    "spline_autoregressive": 2,
}
HIDDEN, BINS, BOUND, RANK = (64, 64), 8, 5.0, 8


class Model(NamedTuple):
    """What is timed: draw(n) -> x (n, dim) and log q (n), with gradients; log_prob(x) of any x, or an exception."""

    parameters: Sequence[Tensor]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]


class Net(nn.Sequential):
    """The conditioner of peers that take any: HIDDEN with ReLU; its second argument, a context, is not used."""

    def __init__(self, inputs: int, outputs: int):
        widths = [inputs, *HIDDEN]
        layers = [module for a, b in itertools.pairwise(widths) for module in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers, nn.Linear(widths[-1], outputs))
        self.hidden_features = HIDDEN[-1]  # by its root nflows and normflows scale bins

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def halves(dim: int, i: int) -> list[bool]:
    """Which coordinates coupling i changes: the odd ones, then the even ones, and so on."""
    return [j % 2 != i % 2 for j in range(dim)]


def plain_flow(family: str, dim: int) -> Flow:
    """The recipe without what it adds to the textbook flow: mixing, the affines after splines and at the end."""
    spline = rational_quadratic(BINS, BOUND)
    if family == "spline":
        splits = [Split(halves(dim, i)) for i in range(LAYERS[family])]
        layers = [Coupling(s, spline, MLP(s.kept, s.changed, spline.count, HIDDEN)) for s in splits]
    elif family == "spline_autoregressive":
        orders = [range(dim), range(dim - 1, -1, -1)]
        conditioners = [MaskedMLP(orders[i % 2], spline.count, HIDDEN) for i in range(LAYERS[family])]
        layers = [Autoregressive(spline, conditioner) for conditioner in conditioners]
    else:
        layers = list(recipe_flow(family, dim).layers)[:-1]
    return Flow(layers, vf.bases.StandardNormal(dim))


def recipe_flow(family: str, dim: int) -> Flow:
    """The recipe as ``fit`` uses it, but for the number of layers."""
    return getattr(vf.recipes, family)(dim, layers=LAYERS[family])


def ours(family: str, dim: int) -> Model:
    return _ours(plain_flow(family, dim))


def recipe(family: str, dim: int) -> Model:
    return _ours(recipe_flow(family, dim))


def _ours(flow: Flow) -> Model:
    return Model(list(flow.parameters()), lambda n: flow().rsample_and_log_prob((n,)), lambda x: flow().log_prob(x))


def pyro_transforms(family: str, dim: int) -> list[Any]:
    import pyro.distributions.transforms as T
    from pyro.nn import AutoRegressiveNN, DenseNN

    split, hidden = dim // 2, list(HIDDEN)
    numbers = [BINS, BINS, BINS - 1]

    def spline_coupling() -> nn.Module:
        net = DenseNN(split, hidden, param_dims=[(dim - split) * n for n in numbers])
        return T.SplineCoupling(dim, split, net, BINS, BOUND, order="quadratic", identity=True)

    def spline_autoregressive() -> nn.Module:
        net = AutoRegressiveNN(dim, hidden, param_dims=numbers)
        return T.SplineAutoregressive(dim, net, BINS, BOUND, order="quadratic")

    make = {
        "planar": lambda: T.planar(dim),
        "radial": lambda: T.radial(dim),
        "sylvester": lambda: T.sylvester(dim, count_transforms=min(dim, RANK)),
        "realnvp": lambda: T.affine_coupling(dim, hidden, split),
        "spline": spline_coupling,
        "iaf": lambda: T.affine_autoregressive(dim, hidden),
        "maf": lambda: T.affine_autoregressive(dim, hidden).inv,
        "spline_autoregressive": spline_autoregressive,
    }[family]
    transforms: list[Any] = []
    for _ in range(LAYERS[family]):
        transforms.append(make())
        if family in ("realnvp", "spline", "iaf", "maf", "spline_autoregressive"):
            transforms.append(T.Permute(torch.arange(dim - 1, -1, -1)))
    return transforms


def pyro(family: str, dim: int) -> Model:
    import pyro.distributions as dist

    transforms = pyro_transforms(family, dim)
    modules = nn.ModuleList(m for t in transforms for m in (t, t.inv) if isinstance(m, nn.Module))
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1), transforms)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = q.rsample((n,))
        return x, q.log_prob(x)

    return Model(list(modules.parameters()), draw, q.log_prob)


def zuko(family: str, dim: int) -> Model:
    """``import zuko`` turns off argument validation in torch.distributions for the whole process: it is restored."""
    validated = torch.distributions.Distribution._validate_args
    try:
        import zuko.flows as flows
        from zuko.distributions import DiagNormal
        from zuko.lazy import Flow as Lazy
        from zuko.lazy import LazyInverse, UnconditionalDistribution
        from zuko.transforms import MonotonicRQSTransform
    finally:
        torch.distributions.Distribution.set_default_validate_args(validated)
    spline = {
        "univariate": partial(MonotonicRQSTransform, bound=BOUND),
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
    }
    options = {"hidden_features": HIDDEN} | (spline if "spline" in family else {})
    layers = []
    for i in range(LAYERS[family]):
        if family in ("realnvp", "spline"):
            mask = torch.tensor([not changes for changes in halves(dim, i)])
            layers.append(LazyInverse(flows.coupling.GeneralCouplingTransform(dim, mask=mask, **options)))
        elif family in ("iaf", "maf", "spline_autoregressive"):
            order = torch.arange(dim) if i % 2 == 0 else torch.arange(dim - 1, -1, -1)
            layer = flows.autoregressive.MaskedAutoregressiveTransform(dim, order=order, **options)
            layers.append(layer if family == "maf" else LazyInverse(layer))
        else:
            raise NotImplementedError(f"no {family} flow")
    base = UnconditionalDistribution(DiagNormal, loc=torch.zeros(dim), scale=torch.ones(dim), buffer=True)
    flow = Lazy(layers, base)
    return Model(list(flow.parameters()), lambda n: flow().rsample_and_log_prob((n,)), lambda x: flow().log_prob(x))


def normflows(family: str, dim: int) -> Model:
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    class Swapped(nf.flows.Flow):
        """The wrapped flow with its directions exchanged."""

        def __init__(self, flow: nn.Module):
            super().__init__()
            self.flow = flow

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.inverse(z)

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.forward(z)

    def mask(i: int) -> Tensor:
        return torch.tensor(halves(dim, i)).to(torch.get_default_dtype())

    made = {"hidden_features": HIDDEN[0], "num_blocks": len(HIDDEN) - 1, "use_residual_blocks": False}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    affine = nf.flows.MaskedAffineAutoregressive
    make = {
        "planar": lambda i: [nf.flows.Planar((dim,))],
        "radial": lambda i: [nf.flows.Radial((dim,))],
        "realnvp": lambda i: [
            nf.flows.AffineCouplingBlock(nf.nets.MLP([(dim + 1) // 2, *HIDDEN, 2 * (dim // 2)])),
            nf.flows.Permute(dim, mode="swap"),
        ],
        "spline": lambda i: [PiecewiseRationalQuadraticCoupling(mask(i), Net, **spline)],
        "iaf": lambda i: [affine(dim, **made), nf.flows.Permute(dim, mode="swap")],
        "maf": lambda i: [Swapped(affine(dim, **made)), nf.flows.Permute(dim, mode="swap")],
        "spline_autoregressive": lambda i: [MaskedPiecewiseRationalQuadraticAutoregressive(dim, **made, **spline)],
    }
    if family not in make:
        raise NotImplementedError(f"no {family} flow")
    flows = [flow for i in range(LAYERS[family]) for flow in make[family](i)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), flows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Model(parameters, model.sample, model.log_prob)


def nflows(family: str, dim: int) -> Model:
    from nflows import transforms as T
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow as Base

    made = {"hidden_features": HIDDEN[0], "num_blocks": len(HIDDEN) - 1, "use_residual_blocks": False}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}

    def coupling(maths: type, i: int, **options) -> nn.Module:
        return maths(torch.tensor(halves(dim, i)).int(), Net, **options)

    make = {
        "realnvp": lambda i: coupling(T.AffineCouplingTransform, i),
        "spline": lambda i: coupling(T.PiecewiseRationalQuadraticCouplingTransform, i, **spline),
        "iaf": lambda i: T.MaskedAffineAutoregressiveTransform(dim, **made),
        "maf": lambda i: T.MaskedAffineAutoregressiveTransform(dim, **made),
        "spline_autoregressive": lambda i: T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            dim, **made, **spline
        ),
    }
    if family not in make:
        raise NotImplementedError(f"no {family} flow that is tied to no encoder")
    layers: list = []
    for i in range(LAYERS[family]):
        layer = make[family](i)
        layers.append(layer if family == "maf" else T.InverseTransform(layer))
        if family in ("iaf", "maf", "spline_autoregressive"):
            layers.append(T.ReversePermutation(dim))
    flow = Base(T.CompositeTransform(layers), StandardNormal([dim]))
    return Model(list(flow.parameters()), flow.sample_and_log_prob, flow.log_prob)


def torchflows(family: str, dim: int) -> Model:
    from torchflows.bijections.base import BijectiveComposition
    from torchflows.bijections.finite.autoregressive import layers as L
    from torchflows.bijections.finite.matrix.permutation import ReversePermutationMatrix
    from torchflows.bijections.finite.residual.architectures import Planar, Radial, Sylvester
    from torchflows.flows import Flow as Base

    net = {"conditioner_kwargs": {"n_hidden": HIDDEN[0], "n_layers": len(HIDDEN) + 1}}
    bins = {"transformer_kwargs": {"n_bins": BINS, "boundary": BOUND}}
    maths, options = {
        "planar": (Planar, {}),
        "radial": (Radial, {}),
        "sylvester": (Sylvester, {}),
        "realnvp": (L.AffineCoupling, net),
        "spline": (L.RQSCoupling, net | bins),
        "iaf": (L.AffineInverseMaskedAutoregressive, net),
        "maf": (L.AffineForwardMaskedAutoregressive, net),
        "spline_autoregressive": (L.RQSInverseMaskedAutoregressive, net | bins),
    }[family]
    layers = []
    for _ in range(LAYERS[family]):
        layers.append(maths((dim,), **options))
        if "Coupling" in maths.__name__ or "Autoregressive" in maths.__name__:
            layers.append(ReversePermutationMatrix((dim,)))
    flow = Base(BijectiveComposition(layers))

    def draw(n: int) -> tuple[Tensor, Tensor]:
        z = flow.base_sample((n,))
        x, logdet = flow.bijection.inverse(z)  # its own sample(return_log_prob=True) has the wrong sign
        return x, flow.base_log_prob(z) - logdet

    return Model([p for p in flow.parameters() if p.requires_grad], draw, flow.log_prob)


PEERS = {"pyro": pyro, "zuko": zuko, "normflows": normflows, "nflows": nflows, "torchflows": torchflows}
