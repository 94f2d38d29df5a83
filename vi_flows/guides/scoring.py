"""How any Pyro guide is scored: log q of the unconstrained values of a model's latent sites, drawn by it or not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import first_line
from ..flows.bases import Base
from ..flows.distribution import Flow
from ..flows.layers.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..inference.estimate.evaluate import BLOCK_ROWS, in_blocks
from ..inference.locate.gaussian import Kind, from_covariance
from ..inference.scoring import as_flow
from ..targets import PyroModel, Target
from ..targets.pyro_run import ModelRun, base_of, is_plate
from ..targets.pyro_sites import Site
from .auto_flow import AutoFlow, sites_of

CANNOT_SCORE = "guide: expected one that gives log q of any value, drawn by it or not"
MOMENTS = 2000  # draws that say where a guide lies, and how far it reaches
TRIAL_DRAWS = 8
SCORE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of log q of a draw as drawn and as scored


@as_flow.register
def _(guide: AutoFlow, target: Target, *args: Any, **kwargs: Any) -> Flow:
    if guide.prototype_trace is None and (args or kwargs):
        guide._setup_prototype(*args, **kwargs)
    flow = guide.current()
    if isinstance(target, PyroModel):
        _needs_model(target)
        guide.check_sites(target)
    return as_flow(flow, target)


@as_flow.register
def _(guide: AutoContinuous, target: Target, *args: Any, **kwargs: Any) -> Flow:
    _needs_model(target)
    return _whitened(LatentVector(guide, target, args, kwargs))


@as_flow.register(Callable)
def _(guide: Callable[..., Any], target: Target, *args: Any, **kwargs: Any) -> Flow:
    _needs_model(target)
    return _whitened(Sites(guide, target, args, kwargs))


def _needs_model(target: Target) -> None:
    if not isinstance(target, PyroModel):
        raise TypeError(f"target: expected a Pyro model beside a Pyro guide, got {type(target).__name__}")
    if any(site.free is not None for site in target.sites):
        raise ValueError("guide: expected a model without imputed sites (obs_mask), got one; use vf.fit on it")


def _whitened(law: LatentVector | Sites) -> Flow:
    """The law as a flow: its own whitening, over the law in the whitened frame."""
    _check_law(law)
    x = law.draw(MOMENTS)[0]
    found, _ = from_covariance(x.mean(0)[None], torch.atleast_2d(torch.cov(x.mT))[None], Kind.GUIDE)
    if not len(found):
        raise ValueError("guide: expected finite draws that vary in every coordinate, got a point, or overflow")
    shift, tril = found.loc[0], found.scale_tril[0]
    return Flow([Fixed(LowerTriangular, shift=shift, scale_tril=tril)], GuideBase(law, shift, tril)).double()


def _check_law(law: LatentVector | Sites) -> None:
    """Raise unless log q of draws is finite, and the same when they are given as when they were drawn."""
    x, drawn = law.draw(TRIAL_DRAWS)
    if not (x.isfinite().all() and drawn.isfinite().all()):
        raise ValueError("guide: expected finite draws and log q, got NaN or infinite ones; look at its parameters")
    try:
        given = law.score(x)
    except Exception as error:  # Pyro's flows raise many kinds
        raise ValueError(f"{CANNOT_SCORE}, got {first_line(error)}; use vf.AutoFlow with such a flow") from error
    tolerance = SCORE_TOLERANCE[law.dtype]
    if not torch.allclose(given, drawn, rtol=tolerance, atol=tolerance * x.shape[1]):
        i = int((given - drawn).abs().nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"{CANNOT_SCORE}, got {float(drawn[i]):.6g} as drawn and {float(given[i]):.6g} as given; "
            "its inverse or its log-determinant is wrong, or it draws random numbers without names"
        )


class GuideBase(Base):
    """The law of z = L⁻¹(x − shift) for a guide's draws x: the guide in its own whitened frame."""

    def __init__(self, law: LatentVector | Sites, shift: Tensor, tril: Tensor):
        super().__init__(len(shift))
        self.law, self.frame = law, LowerTriangular(shift, tril)

    def noise(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        left = torch.Size(shape).numel()
        x = torch.cat([self.law.draw(min(BLOCK_ROWS, left - start))[0] for start in range(0, left, BLOCK_ROWS)])
        return self.frame.inverse_and_logdet(x)[0].reshape(*shape, self.dim)

    def log_prob(self, z: Tensor) -> Tensor:
        x, logdet = self.frame.forward_and_logdet(z)
        return in_blocks(self.law.score, x.reshape(-1, self.dim)).reshape(z.shape[:-1]) + logdet


class LatentVector:
    """A guide of Pyro's that has a distribution over the unconstrained latent vector: draws x, and log q of any x."""

    def __init__(self, guide: AutoContinuous, target: PyroModel, args: tuple, kwargs: dict):
        self.dtype = _precision(guide)
        self.alone = Alone(guide, args, kwargs, self.dtype)
        if list(guide._unconstrained_shapes.items()) != list(sites_of(target).items()):
            raise ValueError("guide: expected the model's latent sites, got others; give the model that it is for")

    def law(self) -> dist.TorchDistribution:
        return self.alone.guide.get_posterior(*self.alone.run.args, **self.alone.run.kwargs)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws x (n, dim) and their log q (n,), in float64."""
        with self.alone.active():
            q = self.law()
            x = q.sample((n,))
            return x.double(), q.log_prob(x).double()

    def score(self, x: Tensor) -> Tensor:
        """log q (n,) of any x (n, dim)."""
        with self.alone.active():
            return self.law().log_prob(x.to(self.dtype)).double()


class Sites:
    """Any guide, site by site, beside the target of its model: draws of unconstrained x, and log q of any x.

    A latent site of the guide is sampled itself, or is a Delta whose unconstrained value comes, entry by entry, from
    auxiliary sites, as in Pyro's autoguides: which entry from which is seen by comparing the numbers of a few draws.
    """

    def __init__(self, guide: Callable[..., Any], target: PyroModel, args: tuple, kwargs: dict):
        self.target, self.dtype = target, _precision(guide)
        self.alone = Alone(guide, args, kwargs, self.dtype)
        with self.alone.active():
            found = self.alone.trace().nodes.items()
        nodes = {n: s for n, s in found if s["type"] == "sample" and not (s["is_observed"] or is_plate(s))}
        for site in target.sites:
            _check_site(site, nodes.get(site.name))
        determined = [site for site in target.sites if _is_delta(nodes[site.name])]
        self.sampled = [site for site in target.sites if site not in determined]
        own = [name for name in nodes if name not in target.names and not _is_delta(nodes[name])]
        self.auxiliary = {name: nodes[name]["value"].shape for name in own}
        self.index = torch.cat([torch.arange(0), *(torch.arange(site.start, site.stop) for site in determined)])
        self.columns = self._match([site.name for site in determined])

    def _match(self, determined: list[str]) -> Tensor:
        """For each determined coordinate of x the auxiliary number (of K, flattened) that it is."""
        count = sum(shape.numel() for shape in self.auxiliary.values())
        if not determined and not count:
            return self.index
        where = ", ".join(determined or self.auxiliary)
        if not determined or not count:
            kind = "random numbers beside the latent sites" if count else "a point estimate"
            raise ValueError(f"guide: expected a density of the latent sites alone, got {kind} ({where})")
        x, _, numbers = self._draw(TRIAL_DRAWS)
        apart = (x[:, self.index, None] - numbers[:, None, :]).abs() / (1 + numbers.abs()[:, None, :])
        closest, columns = apart.amax(0).min(1)
        if bool((closest > SCORE_TOLERANCE[self.dtype]).any()) or len(columns.unique()) != count:
            raise ValueError(
                "guide: expected sites that are sampled, or hold numbers of auxiliary sites as they are, got others "
                f"({where}) whose density cannot be told; use vf.AutoFlow"
            )
        return columns

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws x (n, dim) and their log q (n,), in float64."""
        return self._draw(n)[:2]

    def _draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws x (n, dim), their log q (n,) and the numbers of the auxiliary sites (n, K)."""

        def once(_: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
            trace = self.alone.trace()
            latent = {name: trace.nodes[name]["value"] for name in self.target.names}
            own = {name: trace.nodes[name]["value"].reshape(-1) for name in self.auxiliary}
            return latent, own, trace.log_prob_sum(_counts)

        with self.alone.active(), _NoiseByRow():
            latent, own, log_q = _over_rows(once, torch.zeros(n), randomness="different")
        x = torch.cat([site.unconstrained(latent[site.name].double()) for site in self.target.sites], -1)
        numbers = torch.cat([x[:, :0], *(value.double() for value in own.values())], -1)
        return x, log_q.double() + self._log_det(x), numbers

    def score(self, x: Tensor) -> Tensor:
        """log q (n,) of any unconstrained x (n, dim)."""
        with self.alone.active():
            values = {site.name: site.constrained(x)[0] for site in self.sampled}
            numbers = x.new_zeros(len(x), len(self.columns)).index_copy(1, self.columns, x[:, self.index])
            parts = numbers.split([shape.numel() for shape in self.auxiliary.values()], -1)
            for (name, shape), part in zip(self.auxiliary.items(), parts, strict=True):
                values[name] = part.reshape(len(x), *shape)
            values = {name: value.to(self.dtype) for name, value in values.items()}
            log_q = _over_rows(lambda row: self.alone.trace(row).log_prob_sum(_counts), values)
        return log_q.double() + self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        parts = [site.constrained(x)[1] for site in self.target.sites]
        return sum((part for part in parts if part is not None), x.new_zeros(len(x)))


class _NoiseByRow(TorchFunctionMode):
    """Gives tensors that vmap shares among rows, and so refuses to fill with random numbers, an axis of rows first."""

    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in self.FILLS:
            args = (torch.rand_like(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _over_rows(fn: Callable[[Any], Any], rows: Any, randomness: str = "error") -> Any:
    """fn over the leading axis, by vmap; one by one where the guide does not allow that."""
    try:
        return torch.func.vmap(fn, randomness=randomness)(rows)
    except (RuntimeError, NotImplementedError):
        leaves, spec = tree_flatten(rows)
        each = [fn(tree_unflatten([leaf[i] for leaf in leaves], spec)) for i in range(len(leaves[0]))]
        return tree_map(lambda *parts: torch.stack(parts), *each)


class Alone:
    """A guide apart from its user's: a copy if it is a module, with a parameter store of its own, run in one precision.

    What is judged stays as it is when the user trains on, and what judging does to parameters stays here.
    """

    def __init__(self, guide: Callable[..., Any], args: tuple, kwargs: dict, dtype: torch.dtype):
        try:
            self.run = ModelRun(guide, args, kwargs, dtype)
        except TypeError as error:
            raise TypeError(str(error).replace("model: expected", "guide: expected", 1)) from None
        store = pyro.get_param_store()
        self.state: dict[str, Any] = {"params": {}, "constraints": {}}
        if isinstance(guide, nn.Module):
            with self.run.settings(), torch.no_grad():  # makes a lazy guide's parameters, and takes those of the store
                poutine.block(guide)(*self.run.args, **self.run.kwargs)
            self.run.model = _copied(guide)
        else:  # the parameters of modules (their names have a $) come from the modules
            own = {name: p for name, p in store._params.items() if "$$$" not in name}
            self.state["params"] = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
            self.state["constraints"] = {name: store._constraints[name] for name in own}
        with self.active():
            self.trace()  # registers parameters, which cannot be done under vmap

    @property
    def guide(self) -> Callable[..., Any]:
        return self.run.model

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Under the run's settings, with this parameter store, and without graphs."""
        with self.run.settings(), torch.no_grad(), pyro.get_param_store().scope(self.state):
            yield

    def trace(self, values: dict[str, Tensor] | None = None) -> poutine.Trace:
        """The trace of one run, with the given values; hidden from any handlers outside."""
        return poutine.block(self.run.trace)(values)


def _copied(guide: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a guide that is a module: what is judged stays as it was. Copying strips Pyro's of its model."""
    if not isinstance(guide, nn.Module):
        return guide
    parts = [part for part in guide.modules() if isinstance(part, AutoGuide)]
    kept = [(part._model, part.master) for part in parts]
    try:
        return copy.deepcopy(guide)
    finally:
        for part, (model, master) in zip(parts, kept, strict=True):
            part._model, part.master = model, master


def _check_site(site: Site, node: dict[str, Any] | None) -> None:
    """Raise ValueError unless the guide's node is a density of the model's site."""
    if node is None:
        raise ValueError(f"guide: expected every latent site of the model, got none for '{site.name}'")
    if node["value"].shape != site.shape:
        raise ValueError(
            f"guide: expected site '{site.name}' to have shape {tuple(site.shape)}, as in the model, got "
            f"{tuple(node['value'].shape)}; subsampled plates cannot be scored"
        )
    if not bool(site.support.check(node["value"]).all()):
        raise ValueError(f"guide: expected draws of '{site.name}' in its support {site.support}, got some outside")
    if node["scale"] != 1.0 or not (node["mask"] is None or node["mask"] is True):
        raise ValueError(f"guide: expected a density, got site '{site.name}' under poutine.scale or poutine.mask")


def _precision(guide: Callable[..., Any]) -> torch.dtype:
    parameters = guide.parameters() if isinstance(guide, nn.Module) else pyro.get_param_store().values()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())


def _is_delta(site: dict[str, Any]) -> bool:
    return isinstance(base_of(site["fn"]), dist.Delta)


def _counts(name: str, site: dict[str, Any]) -> bool:
    return not is_plate(site)
