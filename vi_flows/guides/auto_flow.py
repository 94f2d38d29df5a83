"""AutoFlow: a normalizing flow over all latent sites of a model, as a Pyro guide."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_feasible
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import biject_to

from ..flows.bijection import Layer
from ..flows.distribution import Flow, FlowDistribution
from ..flows.layers.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..inference.judge.fitted import Fitted
from ..inference.locate.centring import centred
from ..inference.locate.locate import locate
from ..inference.locate.points import start_points
from ..inference.start import FlowChoice, resolve_flow
from ..running import seeded
from ..targets import PyroModel
from ..targets.resolve import check_keywords
from .recentring import RecentringLayer

MEDIAN_DRAWS = 10_000  # from which medians and quantiles are taken


class AutoFlow(AutoContinuous):
    r"""A guide that is a flow over the unconstrained values of a model's latent sites, for SVI, Predictive and ELBOs.

    .. math:: q(\theta) = q_\text{flow}(x) \, |\det dT/dx|^{-1}, \quad \theta = T(x), \quad
              T = \text{biject\_to(support) per site}

    ::

        guide = vf.AutoFlow(model, "spline", y, sigma)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO(num_particles=32, vectorize_particles=True))
        for _ in range(1000):
            svi.step(y, sigma)
        posterior = vf.diagnose(guide, model, y, sigma)

    With the model's arguments the guide's parameters exist at once, so that a ``state_dict`` or Pyro's parameter store
    can be loaded into a new guide (made with the same arguments and options); without them they are made at the first
    call, as those of Pyro's own guides are. A deepcopy is a guide of its own, of another name. SVI at a constant rate
    leaves noise in the tails, which the diagnosis sees: let the rate decay, or finish by ``vf.fit(..., init=guide)``.

    Parameters
    ----------
    model: a Pyro model with continuous latent sites.
    flow: as in :func:`vi_flows.fit`: "auto", the name of a recipe, a callable dim -> Flow, or a Flow (copied); or a
        fitted :class:`Posterior`, or another AutoFlow, to start from.
    args, kwargs: what the model is called with.
    locate: put a flow that is new on top of the Gaussian that locating finds (Pathfinder, Laplace, Gaussian VI), as fit
        does: without it, scale and position are left to SVI. Seconds; a model that cannot be located (subsampling)
        starts at the standard normal, with a warning.
    reparam: as in :func:`vi_flows.fit`: the flow works in coordinates in which sites of latent location or scale are
        centred as far as the ELBO says (True), as written (False), or to degrees by site; the guide's sites stay those
        of the model. Needs ``locate``.
    path: score a draw with the parameters held, so that SVI follows the path gradient (sticking the landing: Roeder, Wu
        & Duvenaud 2017), whose noise vanishes as q nears p. Right for Trace_ELBO only, at about twice the cost a step.
    dtype: of the parameters and latent values, torch's default dtype unless given.
    name: the prefix of the parameters' names in Pyro's store.

    Raises
    ------
    TypeError or ValueError for a flow of another kind or size, or parameters of another shape in Pyro's store.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowChoice | Fitted | AutoFlow = "auto",
        *args: Any,
        locate: bool = True,
        reparam: bool | Mapping[str, Any] = True,
        path: bool = False,
        dtype: torch.dtype | None = None,
        name: str = "AutoFlow",
        **kwargs: Any,
    ):
        own = {"locate": locate, "reparam": reparam, "path": path, "dtype": dtype, "name": name}
        check_keywords(AutoFlow.__init__, model, kwargs, own)
        super().__init__(model, init_loc_fn=init_to_feasible)
        self._pyro_name = name
        self._plain_model, self._choice, self._locate, self._reparam = (model,), (flow,), locate, reparam
        self._dtype, self._path = dtype or torch.get_default_dtype(), path
        self._warned = False
        if isinstance(flow, str):
            resolve_flow(flow, 1)  # a mistake in it is told at once
        if args or kwargs or _takes_nothing(model):
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise ValueError("guide: expected a model, got a guide unpickled before it was ever called; make it anew")
        super()._setup_prototype(*args, **kwargs)
        choice = self._choice[0]
        self._choice = (None,)
        with poutine.block():  # at a first call inside SVI, none of this belongs to its trace
            flow = self._start(choice, *args, **kwargs)
        self.flow = flow.to(self._dtype).requires_grad_()

    def _start(self, choice: Any, *args: Any, **kwargs: Any) -> Flow:
        """The flow to begin with, on the Gaussian that locating finds where that is asked for."""
        if isinstance(choice, AutoFlow):
            choice.check_sites(self)
            return copy.deepcopy(choice.current())
        if isinstance(choice, Fitted):
            return self._from_posterior(choice)
        located = None
        if self._locate and not isinstance(choice, Flow):
            located = self._located(*args, **kwargs)
        flow, *_ = resolve_flow(choice, self.latent_dim)
        return flow if located is None else functools.reduce(Flow.then, located, flow.double())

    def _located(self, *args: Any, **kwargs: Any) -> list[Layer] | None:
        """The whitening of the located Gaussian, in this guide's order of sites, and the way from its coordinates."""
        try:
            with seeded(0):
                target = PyroModel(self._plain_model[0], *args, **kwargs)
                self.check_sites(target)
                target, near, _ = centred(target, self._reparam, None)
                best = locate(target, start_points(target, near)).best
        except ValueError as error:
            warnings.warn(f"AutoFlow: starts at the standard normal, for the model cannot be located ({error})")
            return None
        whitening = Fixed(LowerTriangular, shift=best.loc[0], scale_tril=best.scale_tril[0])
        return [whitening, RecentringLayer(target)] if target.degrees else [whitening]

    def _from_posterior(self, posterior: Fitted) -> Flow:
        if posterior.flow is None or not any(True for _ in posterior.flow.parameters()):
            raise ValueError("flow: expected a Posterior with a flow of its own, got one without; fit it by vf.fit")
        if posterior.dim != self.latent_dim:
            raise ValueError(
                f"flow: expected a Posterior of dim {self.latent_dim}, as this model has, got {posterior.dim}; "
                "it must come from the same model"
            )
        if isinstance(posterior.target, PyroModel):
            self.check_sites(posterior.target)
            if posterior.target.degrees:
                return copy.deepcopy(posterior.flow).then(RecentringLayer(posterior.target))
        return copy.deepcopy(posterior.flow)

    def sites(self) -> dict[str, torch.Size]:
        """The latent sites in the order of the flow's coordinates, with the shapes of their unconstrained values."""
        if self.prototype_trace is None:
            raise ValueError("guide: expected one that has been called, or built with the model's arguments")
        return dict(self._unconstrained_shapes)

    def check_sites(self, other: PyroModel | AutoFlow) -> None:
        """Raise ValueError unless the other has the same latent sites, in the same order."""
        sites = other.sites() if isinstance(other, AutoFlow) else sites_of(other)
        if list(self.sites().items()) != list(sites.items()):
            raise ValueError(
                f"guide: expected the latent sites {_listed(self.sites())}, got {_listed(sites)}; "
                "both must come from the same model"
            )

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The flow as a distribution over the unconstrained latent vector."""
        flow = self._modules["flow"]  # not self.flow: that would register it with Pyro a second time
        if self._pyro_context.active and not pyro.settings.get("module_local_params"):
            self._register(flow)
        law = flow()
        return PathScored(law.base, law.bijection) if self._path else law

    def current(self) -> Flow:
        """The flow, with the parameters that Pyro's store holds under this guide's name, if any."""
        if "flow" not in self._modules:
            raise ValueError("guide: expected one that has been called, or built with the model's arguments")
        flow, prefix = self._modules["flow"], self._pyro_name + ".flow$$$"
        if not pyro.settings.get("module_local_params") and any(
            name.startswith(prefix)
            for name in pyro.get_param_store().keys()  # noqa: SIM118 (not a dict)
        ):
            self._register(flow)
        return flow

    def _register(self, flow: Flow) -> None:
        """Share parameters with Pyro's store: what the store holds already (after its ``load``) replaces ours."""
        prefix, held = f"{self._pyro_name}.flow", pyro.get_param_store()._params
        constants = param_with_module_name(prefix, "constants")
        pairs = {name: (held.get(param_with_module_name(prefix, name), p), p) for name, p in flow.named_parameters()}
        if any(stored is not own for stored, own in pairs.values()):
            self._check_stored(pairs | {"constants": (held.get(constants), _fingerprint(flow))}, prefix)
        if constants not in held:
            pyro.param(constants, _fingerprint(flow))
        pyro.module(prefix, flow, update_module_params=True)

    def _check_stored(self, pairs: dict[str, tuple[Tensor | None, Tensor]], prefix: str) -> None:
        """Raise ValueError unless what Pyro's store holds fits this guide; warn, once, that it replaces ours."""
        for name, (stored, own) in pairs.items():
            fits = stored is not None and (stored.shape, stored.dtype) == (own.shape, own.dtype)
            if not fits or (name == "constants" and not torch.allclose(stored, own, rtol=1e-5)):
                raise ValueError(
                    f"guide: expected the parameters of {prefix} in Pyro's store to be this guide's, got another's "
                    f"({name} differs), with other data or options; call pyro.clear_param_store() first, give this "
                    "guide a name=, or load a state_dict instead"
                )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"AutoFlow: takes its parameters from Pyro's parameter store, which holds {prefix}; if they are not "
                "its own from an earlier run, call pyro.clear_param_store() first, or give this guide a name="
            )

    @torch.no_grad()
    def draws(self, n: int) -> dict[str, Tensor]:
        """n draws of every latent site, by name, each (n, *shape)."""
        x, start, values = self.current()().rsample((n,)), 0, {}
        for name, shape in self._unconstrained_shapes.items():
            part = x[:, start : start + shape.numel()].reshape(n, *shape)
            values[name] = biject_to(self.prototype_trace.nodes[name]["fn"].support)(part)
            start += shape.numel()
        return values

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every latent entry, from 10,000 draws of a fixed seed."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The quantiles (Q,) of every latent entry, (Q, *shape) by site, from 10,000 draws of a fixed seed."""
        points = torch.as_tensor(quantiles, dtype=self._dtype)
        if points.dim() != 1 or not ((points >= 0) & (points <= 1)).all():
            raise ValueError(f"quantiles: expected a list of numbers between 0 and 1, got {quantiles!r}")
        if self.prototype_trace is None and (args or kwargs):
            self._setup_prototype(*args, **kwargs)
        with seeded(0):
            drawn = self.draws(MEDIAN_DRAWS)
        return {name: torch.quantile(value, points.to(value), dim=0) for name, value in drawn.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the model, which may be any callable, and without Pyro's marks on the parameters."""
        modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}
        return self.__dict__ | {"_modules": modules, "_model": None, "_plain_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        """A guide of its own for the same model (which is not copied), of another name in Pyro's store."""
        if "flow" in self._modules:
            self.current()
        memo |= {id(kept): kept for kept in (self._model, self._plain_model, self.prototype_trace)}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        nn.Module.__init__(other)
        other.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        if self.master is None:  # a part has its name from the whole
            other._pyro_name = f"{self._pyro_name}_copy"
        return other


class PathScored(FlowDistribution):
    """A flow's law whose draws are scored with the flow's parameters held."""

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> PathScored:
        return PathScored(self.base, self.bijection, super().expand(batch_shape).batch_shape)

    def from_noise(self, noise: Tensor, path: bool = True) -> tuple[Tensor, Tensor]:
        return super().from_noise(noise, path)


def _fingerprint(flow: Flow) -> Tensor:
    """A number that tells constants (a whitening, permutations), which Pyro's store does not hold, from others."""
    constants = [value.double().reshape(-1) for value in flow.buffers()]
    whole = torch.cat([torch.zeros(1, dtype=torch.float64, device=flow.device), *constants])
    return (whole * torch.arange(len(whole)).to(whole).cos()).sum()


def sites_of(target: PyroModel) -> dict[str, torch.Size]:
    """The latent sites of a target, with the shapes of the unconstrained values that it holds."""
    return {
        site.name: site.unconstrained_shape if site.free is None else torch.Size([len(site.free)])
        for site in target.sites
    }


def _listed(sites: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sites.items())


def _takes_nothing(model: Callable[..., Any]) -> bool:
    try:
        inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind()
    except (TypeError, ValueError):
        return False
    return True
