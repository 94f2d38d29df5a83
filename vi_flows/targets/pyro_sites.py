"""What a Pyro model's prior runs tell: its latent sites and their places in x, its data, and reasons to refuse it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.params import user_param_name
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from .pyro_run import NUMERICAL, ModelRun, Values, first_line, is_data, is_deterministic, is_plate

Node = dict[str, Any]
PRIOR_RUNS = 3  # compared with one another: a random structure or support shows as a difference
PRIOR_TRIES = 10


@dataclass(frozen=True, eq=False)
class Site:
    """A latent site and its place in x: x[:, start:stop], reshaped, is taken to the support by `transform`.

    shape: of the constrained value, plates included. unconstrained_shape: before the transform. event_dim: of the distribution.
    free: None, or the positions in the flattened unconstrained value that x holds (an imputed site: its missing entries only);
    free_batch: the same among the flattened batch entries.
    """

    name: str
    support: constraints.Constraint
    transform: Transform
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    start: int
    stop: int
    free: Tensor | None = None
    free_batch: Tensor | None = None

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def is_identity(self) -> bool:
        """Whether the transform changes nothing, so that it can be left out."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts

    def constrained(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """This site's values (N, *shape) at x (N, dim), and log|det| of its transform (N,), None where it is 0."""
        u = x[:, self.slice]
        if self.free is not None:
            whole = u.new_zeros(len(u), self.unconstrained_shape.numel())
            u = whole.index_copy(1, self.free, u)
        u = u.reshape(len(u), *self.unconstrained_shape)
        if self.is_identity:
            return u, None
        value = self.transform(u)
        log_det = self.transform.log_abs_det_jacobian(u, value).reshape(len(u), -1)
        if self.free_batch is not None:
            log_det = log_det.index_select(1, self.free_batch)
        return value, log_det.sum(-1)

    def unconstrained(self, value: Tensor) -> Tensor:
        """The slice of x (N, stop - start) that constrained() takes to value (N, *shape)."""
        u = self.transform.inv(value).reshape(len(value), -1)
        return u if self.free is None else u.index_select(1, self.free)

    def coordinate_names(self) -> list[str]:
        """A name for each coordinate of the slice: 'tau', 'theta[3]', 'b[1,2]' (of the unconstrained value)."""
        if not self.unconstrained_shape:
            return [self.name]
        positions = range(self.unconstrained_shape.numel()) if self.free is None else self.free.tolist()
        return [f"{self.name}[{','.join(map(str, _index(p, self.unconstrained_shape)))}]" for p in positions]


@dataclass(frozen=True, eq=False)
class Layout:
    """The sites of a model: latent ones in the order of x, data by name, deterministic ones, and how deep its plates nest."""

    sites: tuple[Site, ...]
    observed: Values
    deterministic: dict[str, torch.Size]
    plate_nesting: int
    draw: Values  # one draw of the latent sites from the prior

    @property
    def dim(self) -> int:
        return self.sites[-1].stop


def inspect_model(run: ModelRun) -> Layout:
    """Run the model from its prior a few times and describe it; raises ValueError, in one line, where it cannot be a target."""
    nodes, *others = [_prior_nodes(run) for _ in range(PRIOR_RUNS)]
    for site in nodes.values():
        _check_plate(site)
    for other in others:
        _check_same_structure(nodes, other)
    latent = {name: site for name, site in nodes.items() if is_latent(site)}
    if not latent:
        raise ValueError("model: expected at least one latent pyro.sample site, got none; sample what is to be inferred without obs=")
    for site in latent.values():
        _check_latent(site)
    _check_supports(run, latent, others)
    for site in nodes.values():
        _check_observed(site)
    sites, start = [], 0
    for site in latent.values():
        sites.append(_site(site, start, nodes))
        start = sites[-1].stop
    if start == 0:
        raise ValueError("model: expected at least one latent coordinate, got latent sites without entries")
    return Layout(
        tuple(sites),
        {name: site["value"] for name, site in nodes.items() if is_data(site)},
        {name: site["value"].shape for name, site in nodes.items() if is_deterministic(site)},
        max([_nesting(site) for site in nodes.values()], default=0),
        {name: site["value"] for name, site in latent.items()},
    )


def is_latent(site: Node) -> bool:
    """Whether a trace node is a latent sample site."""
    return site["type"] == "sample" and not site["is_observed"] and not is_plate(site)


def _prior_nodes(run: ModelRun) -> dict[str, Node]:
    """The sample sites of one validated run from the prior; a draw that breaks the model's numerics is drawn again."""
    for attempt in range(PRIOR_TRIES):
        try:
            trace = run.prior(validate=True)
            break
        except NUMERICAL as error:
            if attempt == PRIOR_TRIES - 1:
                empty = "size cannot be zero" in str(error)
                remedy = "a plate is empty, so pass data" if empty else "repair the model, or the data against their distribution"
                raise ValueError(
                    f"model: expected to run with latent values from its prior, got {first_line(error)} "
                    f"in {PRIOR_TRIES} of {PRIOR_TRIES} runs; {remedy}"
                ) from error
    params = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    run.params = run.params or {user_param_name(name): value.detach().to(run.dtype) for name, value in params.items()}
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _check_plate(site: Node) -> None:
    if is_plate(site) and site["value"] is not None and len(site["value"]) < site["fn"].size:
        raise ValueError(
            f"plate '{site['name']}': expected all {site['fn'].size} rows, got a subsample of {len(site['value'])}; "
            "remove subsample_size (minibatches are not supported for a Pyro model yet)"
        )


def _check_same_structure(nodes: dict[str, Node], other: dict[str, Node]) -> None:
    changed = sorted(set(nodes) ^ set(other))
    if changed:
        raise ValueError(
            f"model: expected the same sites in every run, got '{changed[0]}' in some runs only; "
            "make the structure fixed (e.g. torch.where, or a mixture distribution)"
        )
    for name, site in nodes.items():
        shapes = [tuple(getattr(s["value"], "shape", ())) for s in (site, other[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"site '{name}': expected one shape in every run, got {shapes[0]} and {shapes[1]}; fix its size")


def _check_latent(site: Node) -> None:
    name, fn = site["name"], site["fn"]
    try:
        support = _support(fn)
        discrete = support.is_discrete
    except (NotImplementedError, AttributeError):
        raise ValueError(f"site '{name}': expected a distribution with a support, got {_kind(fn)}, which has none") from None
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
            f"site '{name}': expected a support that torch.distributions.biject_to maps R^n onto, got {support} of {_kind(fn)}; "
            "write it with another parametrisation (e.g. LKJCholesky and scales for a covariance, a normalised Normal for a sphere)"
        ) from None


def _check_supports(run: ModelRun, latent: dict[str, Node], others: list[dict[str, Node]]) -> None:
    for name, site in latent.items():
        for other in others:
            if not _same(_support(site["fn"]), _support(other[name]["fn"])):
                parent = _support_parent(run, name, latent, other)
                because = f" depends on the latent site '{parent}'" if parent else " changes from run to run"
                raise ValueError(
                    f"site '{name}': expected a fixed support, got {_kind(site['fn'])} whose support{because}; "
                    "sample a variable of fixed support and transform it (e.g. Uniform(0, 1) times the bound), with pyro.deterministic"
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
        if not _same(_support(latent[name]["fn"]), _support(changed["fn"])):
            return parent
    return None


def _check_observed(site: Node) -> None:
    if not is_data(site):
        return
    name, value, fn = site["name"], site["value"], site["fn"]
    if value.numel() == 0:
        raise ValueError(f"site '{name}': expected observed data, got an empty tensor of shape {tuple(value.shape)}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        where = tuple((~value.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"site '{name}': expected finite observed data, got {float(value[where])} at index {list(where)}; remove the row, "
            "or impute it with obs_mask and any finite value in its place (a masked NaN makes gradients NaN)"
        )
    batch = value.shape[: value.dim() - fn.event_dim]
    log_prob = torch.broadcast_shapes(batch, fn.batch_shape)
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    expected = _plate_shape(frames)
    grown = math.prod(log_prob) > max(math.prod(batch), math.prod(fn.batch_shape))
    if value.shape != fn.shape() and (grown or (frames and log_prob != expected)):
        raise ValueError(
            f"site '{name}': expected data of the distribution's shape, got {tuple(value.shape)} against {tuple(fn.shape())}, "
            f"which broadcast to {tuple(log_prob)}; reshape the data or the mean, e.g. with .squeeze(-1)"
        )


def _plate_shape(frames: list[Any]) -> torch.Size:
    shape = [1] * max((-frame.dim for frame in frames), default=0)
    for frame in frames:
        shape[frame.dim] = frame.size
    return torch.Size(shape)


def _site(site: Node, start: int, nodes: dict[str, Node]) -> Site:
    name, fn, value = site["name"], site["fn"], site["value"]
    support = _support(fn)
    transform = biject_to(support)
    shape = transform.inverse_shape(value.shape)
    free, free_batch = _imputed_entries(site, shape, nodes)
    size = shape.numel() if free is None else len(free)
    return Site(name, support, transform, value.shape, shape, fn.event_dim, start, start + size, free, free_batch)


def _imputed_entries(site: Node, shape: torch.Size, nodes: dict[str, Node]) -> tuple[Tensor | None, Tensor | None]:
    """Of the latent half of pyro.sample(..., obs_mask=): the entries that are missing. The others have no density at all."""
    name, mask = site["name"], site["mask"]
    if not isinstance(mask, Tensor) or not name.endswith("_unobserved") or name[:-10] + "observed" not in nodes:
        return None, None
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    mask = mask.expand(batch)
    if bool(mask.all()):
        return None, None
    whole = mask.reshape(*batch, *(1,) * (len(shape) - len(batch))).expand(shape)
    return whole.reshape(-1).nonzero()[:, 0], mask.reshape(-1).nonzero()[:, 0]


def _support(fn: Any) -> constraints.Constraint:
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


def _nesting(site: Node) -> int:
    plates = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    return max([len(getattr(site["fn"], "batch_shape", ())), *plates])


def _kind(fn: Any) -> str:
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _index(position: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        position, last = divmod(position, size)
        index.insert(0, last)
    return tuple(index)
