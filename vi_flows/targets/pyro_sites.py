"""What a Pyro model's prior runs tell: its latent sites and their places in x, its data, and reasons to refuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.params.param_store import normalize_param_name, user_param_name
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from ..errors import first_line
from .pyro_centring import centrable, frame_of
from .pyro_refusals import (
    check_data_support,
    check_latent,
    check_observed,
    check_plate,
    check_same_structure,
    check_supports,
    support_of,
)
from .pyro_run import NUMERICAL, ModelRun, Values, is_data, is_deterministic, is_factor, is_plate, seeded_in_use

Node = dict[str, Any]
PRIOR_RUNS = 3  # compared with one another: a random structure or support shows as a difference
PRIOR_TRIES = 10
LISTED_SITES, SHOWN_VALUES = 8, 4  # sites in a sentence, and numbers of one


@dataclass(frozen=True, eq=False)
class Site:
    """A latent site and its place in x: x[:, start:stop], reshaped, is taken to the support by `transform`.

    shape: of the constrained value, plates included. unconstrained_shape: before the transform. event_dim: of the
    distribution. free: None, or the positions in the flattened unconstrained value that x holds (an imputed site: its
    missing entries only); free_batch: the same among the flattened batch entries.
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

    def checked(self, value: Tensor) -> Tensor:
        """Values (N, *shape) of one value or of N. Raises ValueError for another shape or outside the support."""
        batch = value if value.dim() > len(self.shape) else value[None]
        if batch.shape[1:] != self.shape:
            got = tuple(value.shape)
            raise ValueError(f"values['{self.name}']: expected shape {tuple(self.shape)} or (N, ...), got {got}")
        if not bool(self.support.check(batch).all()):
            raise ValueError(f"values['{self.name}']: expected values in the support {self.support}, got some outside")
        return batch

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
    """The sites of a model: latent ones in the order of x, data, factors, deterministic ones; how deep its plates nest.

    centrable: the names of latent sites whose location or scale is latent too, and whether that scale is a matrix.
    """

    sites: tuple[Site, ...]
    centrable: dict[str, bool]
    observed: Values
    factors: tuple[str, ...]
    deterministic: dict[str, torch.Size]
    plate_nesting: int

    @property
    def dim(self) -> int:
        return self.sites[-1].stop


def inspect_model(run: ModelRun) -> Layout:
    """Run the model from its prior a few times and describe it; raises ValueError where it cannot be a target, with
    whatever the model itself raises put into one line."""
    try:
        return _inspected(run)
    except (ValueError, TypeError):
        raise
    except NotImplementedError as error:
        raise ValueError(first_line(error).removeprefix("NotImplementedError: ")) from error
    except Exception as error:
        raise ValueError(
            f"model: expected to run with latent values from its prior, got {first_line(error)}"
        ) from error


def _inspected(run: ModelRun) -> Layout:
    nodes, *others = [_prior_nodes(run) for _ in range(PRIOR_RUNS)]
    for site in nodes.values():
        check_plate(site)
    for other in others:
        check_same_structure(nodes, other)
    latent = {name: site for name, site in nodes.items() if is_latent(site)}
    if not latent:
        raise ValueError(
            "model: expected at least one latent pyro.sample site, got none; sample what is to be inferred without obs="
        )
    for site in latent.values():
        check_latent(site)
    check_supports(run, latent, others)
    for name, site in nodes.items():
        if is_data(site):
            check_observed(site)
            check_data_support(site, [other[name]["fn"] for other in others])
    sites, start = [], 0
    for site in latent.values():
        sites.append(_site(site, start, nodes))
        start = sites[-1].stop
    if start == 0:
        raise ValueError("model: expected at least one latent coordinate, got latent sites without entries")
    return Layout(
        tuple(sites),
        {
            site.name: frame_of(nodes[site.name]["fn"]).tril is not None
            for site in sites
            if site.free is None and centrable(nodes[site.name], [other[site.name] for other in others])
        },
        {name: site["value"] for name, site in nodes.items() if is_data(site)},
        tuple(name for name, site in nodes.items() if is_factor(site)),
        {name: site["value"].shape for name, site in nodes.items() if is_deterministic(site)},
        max([_nesting(site) for site in nodes.values()], default=0),
    )


def account(observed: Values, factors: list[str], fixed: Values) -> list[str]:
    """Sentences on a model's data, by observed sites and factors, and on what it holds fixed."""
    sites = [f"'{name}' ({value.numel()} value{'s' if value.numel() != 1 else ''})" for name, value in observed.items()]
    sites += [f"pyro.factor '{name}'" for name in factors]
    told = (
        f"data: {_listed(sites)}."
        if sites
        else "no data: no site is observed and nothing is a factor: this is the prior."
    )
    held = [f"{name} = {_value(value)}" for name, value in fixed.items()]
    return [told, *([f"held fixed, not inferred: {_listed(held)}."] if held else [])]


def _listed(items: list[str]) -> str:
    more = len(items) - LISTED_SITES
    return ", ".join(items[:LISTED_SITES]) + (f" and {more} more" if more > 0 else "")


def _value(value: Tensor) -> str:
    """A constant in a sentence: its numbers where they are few, else their shape and range."""
    if value.numel() == 1:
        return f"{float(value):.4g}"
    if value.numel() <= SHOWN_VALUES:
        return f"[{', '.join(f'{v:.4g}' for v in value.flatten().tolist())}]"
    shape = " × ".join(map(str, value.shape))
    return f"{shape} numbers from {float(value.min()):.4g} to {float(value.max()):.4g}"


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
                remedy = "a plate is empty, so pass data" if empty else "repair the model, or its data"
                raise ValueError(
                    f"model: expected to run with latent values from its prior, got {first_line(error)} "
                    f"in {PRIOR_TRIES} of {PRIOR_TRIES} runs; {remedy}"
                ) from error
    params = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    run.params = run.params or {user_param_name(name): value.detach().to(run.dtype) for name, value in params.items()}
    run.held = run.held or {normalize_param_name(name): value.detach() for name, value in params.items()}
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _site(site: Node, start: int, nodes: dict[str, Node]) -> Site:
    name, fn, value = site["name"], site["fn"], site["value"]
    support = support_of(fn)
    transform = biject_to(support)
    shape = transform.inverse_shape(value.shape)
    free, free_batch = _imputed_entries(site, shape, nodes)
    size = shape.numel() if free is None else len(free)
    return Site(name, support, transform, value.shape, shape, fn.event_dim, start, start + size, free, free_batch)


def plate_dims(run: ModelRun, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """{"theta": ["schools"]}: names of the axes of values of these shapes, plates as one run from the prior shows."""
    try:
        with seeded_in_use(0):
            nodes = run.prior().nodes
    except NUMERICAL:  # names are a convenience
        return {}
    dims = {}
    for name, shape in shapes.items():
        node = nodes.get(name, {"type": "", "fn": None, "cond_indep_stack": ()})
        event_dim = 0 if is_deterministic(node) else getattr(node["fn"], "event_dim", 0)
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        axes = {len(shape) - event_dim + frame.dim: frame for frame in frames}
        plates = {i: f.name for i, f in axes.items() if i >= 0 and shape[i] == f.size}
        if plates and not {"chain", "draw"} & {*plates.values()}:  # ArviZ's own axes
            dims[name] = [plates.get(axis, f"{name}_dim_{axis}") for axis in range(len(shape))]
    return dims


def _imputed_entries(site: Node, shape: torch.Size, nodes: dict[str, Node]) -> tuple[Tensor | None, Tensor | None]:
    """The missing entries of the latent half of pyro.sample(..., obs_mask=); the others have no density at all."""
    name, mask = site["name"], site["mask"]
    if not isinstance(mask, Tensor) or not name.endswith("_unobserved") or name[:-10] + "observed" not in nodes:
        return None, None
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    mask = mask.expand(batch)
    if bool(mask.all()):
        return None, None
    whole = mask.reshape(*batch, *(1,) * (len(shape) - len(batch))).expand(shape)
    return whole.reshape(-1).nonzero()[:, 0], mask.reshape(-1).nonzero()[:, 0]


def _nesting(site: Node) -> int:
    plates = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    return max([len(getattr(site["fn"], "batch_shape", ())), *plates])


def _index(position: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        position, last = divmod(position, size)
        index.insert(0, last)
    return tuple(index)
