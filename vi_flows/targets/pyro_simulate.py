"""Data that a Pyro model makes: its observed sites drawn anew, put in place of its data, or added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import first_line
from .pyro_model import PyroModel
from .pyro_run import Values, base_of

Node = dict[str, Any]
REPLICATE = "{}__replicate"  # the name of an observed site's second data


def simulate(model: PyroModel, values: Mapping[str, Tensor]) -> Values:
    """Draw y* ~ p(y | θ): the observed sites by name, each of its data's shape and dtype, at one point's values θ.

    values: one for each latent site, of its shape; others (deterministic sites) are ignored. Sites of the model that
    read the value of an earlier observed site, as pyro.sample returned it, read the simulated one; what the model reads
    in its arguments stays as it is (:func:`conditioned_on_data`). Entries under a mask are drawn too, and count as
    little as the data there. Uses torch's global random numbers.

    Raises ValueError, in one line, without observed sites, and for what cannot be simulated: pyro.factor, obs_mask=,
    poutine.scale, distributions that cannot be drawn from, latent sites that read what an observed one returned.
    """
    nodes = _simulated(model, values)
    _check_simulable(model, nodes)
    _check_prior_reads_no_data(model, nodes)
    return {name: _as_data(name, nodes[name]["value"], data) for name, data in model.observed.items()}


def with_data(model: PyroModel, data: Mapping[str, Tensor]) -> PyroModel:
    """The model with other data at its observed sites, of the same shapes; all else that it reads stays as it is."""
    return _remade(model, poutine.condition(_program(model), data=dict(data)))


def with_replicate(model: PyroModel, data: Mapping[str, Tensor]) -> PyroModel:
    r"""The model given its own data y and a second set y* from the same θ, data; x means what it does in model.

    .. math:: \log p(x) = \log p(\theta) + \log p(y \mid \theta) + \log p(y^* \mid \theta) + \log|\det dT/dx|

    The second set is observed at sites named "y__replicate". Its density comes from a second run of the model, with the
    latent values of the first, of which only the observed sites count.
    """
    program, data = _program(model), dict(data)

    def both(*args: Any, **kwargs: Any) -> None:
        with poutine.trace() as first:
            program(*args, **kwargs)
        with _Replicate({name: first.trace.nodes[name]["value"] for name in model.names}, data):
            program(*args, **kwargs)

    return _remade(model, both)


def check_prior(model: PyroModel, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError, in one line, unless draws of the latent sites are draws of the prior: no mask, no scale."""
    nodes = _simulated(model, values)
    for name in model.names:
        fn, mask = nodes[name]["fn"], nodes[name]["mask"]
        while fn is not base_of(fn) and mask is None:
            mask, fn = getattr(fn, "_mask", None), fn.base_dist
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError(f"site '{name}': expected a proper prior, got one under a mask; give it a distribution")
        _check_scale(name, nodes[name])


def conditioned_on_data(model: PyroModel, values: Mapping[str, Tensor]) -> list[str]:
    """Observed sites whose distributions read, among the model's arguments, numbers that are data of some site too.

    Such is an autoregression, obs=y[1:] around y[:-1], where both are the argument y: its simulated data are single
    steps from the real ones, not a series. Found by derivatives: integers, and data that are no arguments, go unseen.
    """
    run, leaves = model._run, []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(Tensor, leaf, (run.args, run.kwargs))
    try:
        with run.settings(), poutine.trace() as traced, poutine.condition(data=_latent(model, values)):
            poutine.substitute(run.model, data=run.params)(*args, **kwargs)
        sites = {name: traced.trace.nodes[name] for name in model.observed}
        data = _influence([(site["value"] * torch.rand(site["value"].shape)).sum() for site in sites.values()], leaves)
        return [
            name
            for name, site in sites.items()
            if any(bool((read & known).any()) for read, known in zip(_read_by(site, leaves), data, strict=True))
        ]
    except (RuntimeError, TypeError, NotImplementedError):  # the model writes into its arguments, or leaves torch
        return []


def _read_by(site: Node, leaves: list[Tensor]) -> list[Tensor]:
    """Which entries of each leaf the distribution of an observed site depends on."""
    return _influence([site["fn"].log_prob(site["value"].detach()).sum()], leaves)


def _influence(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Which entries of each leaf the sum of the results depends on."""
    total = sum(result for result in results if result.requires_grad)
    if not isinstance(total, Tensor) or not leaves:
        return [torch.zeros_like(leaf, dtype=torch.bool) for leaf in leaves]
    gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [gradient != 0 for gradient in gradients]


class _Unobserved(poutine.messenger.Messenger):
    """Draws the named observed sites."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = set(names)

    def _pyro_sample(self, msg: Node) -> None:
        if msg["name"] in self.names:
            msg["value"], msg["is_observed"], msg["done"] = None, False, False


class _Replicate(poutine.messenger.Messenger):
    """Shows what is outside only the observed sites, by other names and with other data; latent values are given."""

    def __init__(self, values: Values, data: Values) -> None:
        super().__init__()
        self.values, self.data = values, data

    def _pyro_sample(self, msg: Node) -> None:
        name = msg["name"]
        if name in self.data:
            msg["name"], msg["value"] = REPLICATE.format(name), self.data[name]
            return
        if name in self.values:
            msg["value"], msg["is_observed"] = self.values[name], True
        msg["stop"] = True


def _latent(model: PyroModel, values: Mapping[str, Tensor]) -> Values:
    return {name: torch.as_tensor(values[name], dtype=model.dtype, device=model.device) for name in model.names}


def _simulated(model: PyroModel, values: Mapping[str, Tensor]) -> dict[str, Node]:
    """The sample sites of a run at these latent values, with the observed ones drawn."""
    if not model.observed:
        raise ValueError("model: expected an observed site to simulate, got none; give the data by pyro.sample(obs=)")
    run = model._run
    try:
        with torch.no_grad(), run.settings(), _Unobserved(model.observed):
            nodes = run.trace(_latent(model, values)).nodes
    except NotImplementedError as error:
        raise ValueError(f"model: expected observed sites that can be drawn from, got {first_line(error)}") from error
    return {name: site for name, site in nodes.items() if site["type"] == "sample"}


def _check_simulable(model: PyroModel, nodes: dict[str, Node]) -> None:
    """Raise for observed sites whose density is not that of whole data which can be drawn."""
    for name, site in nodes.items():
        if site["is_observed"] and site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"site '{name}': expected data that can be simulated, got pyro.factor; "
                "write the likelihood by pyro.sample(obs=), with a distribution"
            )
    for name in model.observed:
        if name.endswith("_observed") and name.removesuffix("observed") + "unobserved" in model.names:
            raise ValueError(
                f"site '{name.removesuffix('_observed')}': expected data without gaps to simulate, got obs_mask=; "
                "leave out the missing entries"
            )
        _check_scale(name, nodes[name])


def _check_scale(name: str, site: Node) -> None:
    if bool((torch.as_tensor(site["scale"]) != 1).any()):
        raise ValueError(f"site '{name}': expected a density of scale 1, got poutine.scale; remove it to simulate")


def _check_prior_reads_no_data(model: PyroModel, simulated: dict[str, Node]) -> None:
    """Raise for a latent site whose distribution is another beside simulated data: p(θ) is no factor of p(θ, y)."""
    run, values = model._run, {name: simulated[name]["value"] for name in model.names}
    with torch.no_grad(), run.settings():
        nodes = run.trace(values).nodes
        for name, value in values.items():
            here, there = (found[name]["fn"].log_prob(value) for found in (nodes, simulated))
            if not torch.allclose(here, there, rtol=1e-6, atol=1e-9, equal_nan=True):
                raise ValueError(
                    f"site '{name}': expected a prior that reads no data, got one that depends on the value of an "
                    "observed site; such data cannot be simulated for given parameters"
                )


def _as_data(name: str, drawn: Tensor, data: Tensor) -> Tensor:
    """The draw in its data's dtype; raises for a shape that is not the data's."""
    if drawn.shape != data.shape:
        raise ValueError(
            f"site '{name}': expected draws of the data's shape {tuple(data.shape)}, got {tuple(drawn.shape)}; "
            "expand the data, or put the site in its plates"
        )
    return drawn.to(data)


def _program(model: PyroModel) -> Callable[..., Any]:
    """The Pyro model behind it, with its pyro.param sites at the values that they have there."""
    program = model._call[0]
    return poutine.substitute(program, data=model._run.params) if model._run.params else program


def _remade(model: PyroModel, program: Callable[..., Any]) -> PyroModel:
    """program as a target, with the arguments and the settings of model."""
    _, args, kwargs = model._call
    made = PyroModel(program, *args, **kwargs)
    if (made.dtype, made.device) != (model.dtype, model.device):
        made = made.to(model.dtype, model.device)
    made.nonfinite, made.capture = model.nonfinite, model.capture
    return made.recentred(model.degrees) if model.degrees else made
