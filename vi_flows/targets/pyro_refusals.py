"""Why a Pyro model is refused as a target: each reason in one line, with the site, what came, and the remedy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from .pyro_run import NUMERICAL, ModelRun, base_of, is_plate

Node = dict[str, Any]


def check_plate(site: Node) -> None:
    """Raise for a plate that takes a subsample of its rows."""
    if is_plate(site) and site["value"] is not None and len(site["value"]) < site["fn"].size:
        raise ValueError(
            f"plate '{site['name']}': expected all {site['fn'].size} rows, got a subsample of {len(site['value'])}; "
            "remove subsample_size (minibatches are not supported for a Pyro model yet)"
        )


def check_same_structure(nodes: dict[str, Node], other: dict[str, Node]) -> None:
    """Raise unless two runs have the same sites of the same shapes."""
    changed = sorted(set(nodes) ^ set(other))
    if changed:
        raise ValueError(
            f"model: expected the same sites in every run, got '{changed[0]}' in some runs only; "
            "make the structure fixed (e.g. torch.where, or a mixture distribution)"
        )
    for name, site in nodes.items():
        shapes = [tuple(getattr(s["value"], "shape", ())) for s in (site, other[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"site '{name}': expected one shape in every run, got {shapes[0]} and {shapes[1]}; fix its size"
            )


def check_latent(site: Node) -> None:
    """Raise for a latent site without a support, a discrete one, or one whose support has no bijection with R^n."""
    name, fn = site["name"], site["fn"]
    try:
        support = support_of(fn)
        discrete = support.is_discrete
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"site '{name}': expected a distribution with a support, got {_kind(fn)}, which has none"
        ) from None
    if _kind(fn) == "Delta":
        raise ValueError(
            f"site '{name}': expected a continuous latent variable, got Delta; use pyro.deterministic for a fixed value"
        )
    if discrete:
        raise ValueError(
            f"site '{name}': expected a continuous latent variable, got discrete {_kind(fn)}; "
            "sum it out by hand (e.g. MixtureSameFamily, or logsumexp in pyro.factor); enumeration is not supported yet"
        )
    try:
        transform = biject_to(support)
        u = transform.inv(site["value"])
        log_det = transform.log_abs_det_jacobian(u, transform(u))
        batch = site["value"].dim() - fn.event_dim
        if not transform.bijective or log_det.shape != site["value"].shape[:batch]:
            raise NotImplementedError
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"site '{name}': expected a support that torch.distributions.biject_to maps R^n onto, "
            f"got {support} of {_kind(fn)}; write it with another parametrisation (e.g. LKJCholesky and scales for a "
            "covariance, a normalised Normal for a sphere)"
        ) from None


def check_supports(run: ModelRun, latent: dict[str, Node], others: list[dict[str, Node]]) -> None:
    """Raise for a support that differs between runs, naming the latent site behind it."""
    for name, site in latent.items():
        for other in others:
            if not _same(support_of(site["fn"]), support_of(other[name]["fn"])):
                parent = _support_parent(run, name, latent, other)
                because = f" depends on the latent site '{parent}'" if parent else " changes from run to run"
                raise ValueError(
                    f"site '{name}': expected a fixed support, got {_kind(site['fn'])} whose support{because}; "
                    "sample a variable of fixed support and transform it (e.g. Uniform(0, 1) times the bound), "
                    "with pyro.deterministic"
                )


def _support_parent(run: ModelRun, name: str, latent: dict[str, Node], other: dict[str, Node]) -> str | None:
    """The first latent site before `name` whose value alone changes the support of `name`."""
    values = {key: site["value"] for key, site in latent.items()}
    for parent in list(values)[: list(values).index(name)]:
        try:
            with run.settings(), torch.no_grad():
                changed = run.trace({**values, parent: other[parent]["value"]}).nodes[name]
        except NUMERICAL:
            continue
        if not _same(support_of(latent[name]["fn"]), support_of(changed["fn"])):
            return parent
    return None


def check_observed(site: Node) -> None:
    """Raise for data that are empty, not finite, or broadcast against their distribution."""
    name, value, fn = site["name"], site["value"], site["fn"]
    if value.numel() == 0:
        raise ValueError(f"site '{name}': expected observed data, got an empty tensor of shape {tuple(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        where = tuple((~value.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"site '{name}': expected finite observed data, got {float(value[where])} at index {list(where)}; "
            "remove the row, or impute it by obs_mask over any finite value (a masked NaN makes gradients NaN)"
        )
    batch = value.shape[: value.dim() - fn.event_dim]
    log_prob = torch.broadcast_shapes(batch, fn.batch_shape)
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    expected = _plate_shape(frames, log_prob)
    grown = math.prod(log_prob) > max(math.prod(batch), math.prod(fn.batch_shape))
    if value.shape != fn.shape() and (grown or (frames and log_prob != expected)):
        raise ValueError(
            f"site '{name}': expected data of the distribution's shape, got {tuple(value.shape)} "
            f"against {tuple(fn.shape())}, which broadcast to {tuple(log_prob)}; "
            "reshape the data or the mean, e.g. with .squeeze(-1)"
        )


def check_data_support(site: Node, others: list[Any]) -> None:
    """Raise for data outside a fixed support (one that depends on latent values may exclude data in some draws)."""
    fn, value = site["fn"], site["value"]
    try:
        support = fn.support
        fixed = all(_same(support, other.support) for other in others)
        inside = not fixed or support.check(value)
    except (NotImplementedError, AttributeError):
        return
    if vars(fn).get("_validate_args", True) and not bool(torch.as_tensor(inside).all()):
        where = (~inside).nonzero()[0].tolist()
        raise ValueError(
            f"site '{site['name']}': expected data in the support {support} of {_kind(fn)}, "
            f"got a value outside at index {where}; repair the data or take another distribution"
        )


def _plate_shape(frames: list[Any], found: torch.Size) -> torch.Size:
    """The batch shape that plates ask for; a plate without a size, whose frame says -1, takes what it finds."""
    shape = [1] * max((-frame.dim for frame in frames), default=0)
    for frame in frames:
        known = frame.size != -1 or -frame.dim > len(found)
        shape[frame.dim] = frame.size if known else found[frame.dim]
    return torch.Size(shape)


def support_of(fn: Any) -> constraints.Constraint:
    """fn.support; a mixture's is its components' (torch wraps it in a class without a transform)."""
    support = fn.support
    wrapped = type(support).__name__ == "MixtureSameFamilyConstraint"
    return support.base_constraint if wrapped else support


def _same(a: Any, b: Any) -> bool:
    """Whether two supports are the same, parameters included."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool((a == b).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, constraints.Constraint):
        return vars(a).keys() == vars(b).keys() and all(_same(vars(a)[key], vars(b)[key]) for key in vars(a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _kind(fn: Any) -> str:
    return type(base_of(fn)).__name__
