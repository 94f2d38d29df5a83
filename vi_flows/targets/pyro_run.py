"""One run of a Pyro model: its settings, its joint log density at given values, and what survives a failing row."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What the numbers of one row can raise; at run time anything else is a mistake in the program and is left alone.
# Adaptive ODE solvers assert that their step has not underflowed.
NUMERICAL = (torch.linalg.LinAlgError, ValueError, ArithmeticError, AssertionError)

Values = dict[str, Tensor]


class ModelRun:
    """A model with its arguments cast to one dtype and device; every method runs it once under :func:`settings`.

    params: constants for the model's pyro.param sites, by name; the parameter store is left alone. held: the same by
    names that tell modules apart, as the first run had them. fills: whether tensors that the model makes by torch.zeros
    and the like join the batch under vmap, so that it may write into them. centring: None, or which sites are given by
    coordinates (:class:`pyro_centring.Centring`) where a density is asked for.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        check_arguments(model, args, kwargs)
        self.model = model
        self.args: tuple = cast(args, dtype, device)
        self.kwargs: dict = cast(kwargs, dtype, device)
        self.dtype = dtype
        self.params: Values = {}
        self.centring: Any = None
        self.held: Values = {}
        self.fills = False

    def settings(self, validate: bool = False) -> contextlib.AbstractContextManager[None]:
        """The model's default dtype, and validation off unless asked for; the user's are restored on leaving."""
        return settings(self.dtype, validate)

    def trace(
        self, values: Values | None = None, given: contextlib.AbstractContextManager | None = None
    ) -> poutine.Trace:
        """The trace of one run, with the given latent values (by values, or by a handler) or with draws from the prior.
        Call under settings()."""
        with contextlib.ExitStack() as stack:
            tracer = stack.enter_context(poutine.trace())
            if given is not None:
                stack.enter_context(given)
            if values is not None:
                stack.enter_context(poutine.condition(data=values))
                if self.fills:
                    every = values if given is None else values | given.given
                    stack.enter_context(_Filled(next(iter(every.values()))))
            if self.params:
                stack.enter_context(poutine.substitute(data=self.params))
            self.model(*self.args, **self.kwargs)
        return tracer.trace

    def prior(self, validate: bool = False) -> poutine.Trace:
        """A run with latent values from the prior, in a copy of the parameter store (pyro.param writes into it)."""
        store = pyro.get_param_store()
        with self.settings(validate), store.scope(store.get_state()), torch.no_grad(), _PriorDraws(self.dtype):
            return self.trace()

    def _at(self, values: Values) -> tuple[poutine.Trace, Any]:
        """The trace at values, or at coordinates of the sites that ``centring`` names, and the handler that does it."""
        if self.centring is None:
            return self.trace(values), None
        given = self.centring.given(values)
        plain = {name: value for name, value in values.items() if name not in self.centring.sites}
        return self.trace(plain, given), given

    def log_joint(self, values: Values) -> Tensor:
        """log p(values, data) of one point, a scalar. Call under settings()."""
        trace, given = self._at(values)
        total = torch.as_tensor(trace.log_prob_sum(_counts))
        return total if given is None else sum((part.sum() for part in given.log_det), total)

    def log_joint_in_plate(self, values: Values, dim: int) -> Tensor:
        """log p(values, data) (N,) of values with the particles at plate dimension `dim`. Call under settings()."""
        count = len(next(iter(values.values())))
        with pyro.plate("_particles", count, dim=dim):
            trace, given = self._at(values)
        trace.compute_log_prob(_counts)
        log_det = [] if given is None else given.log_det
        total = sum((part.reshape(count, -1).sum(-1) for part in log_det), torch.zeros(()))
        for site in trace.nodes.values():
            if "log_prob" in site:
                log_p = site["log_prob"]
                if log_p.dim() != -dim or log_p.shape[0] != count:
                    raise ValueError(
                        f"site '{site['name']}' has log_prob of shape {tuple(log_p.shape)} in the particle plate"
                    )
                total = total + log_p.reshape(count, -1).sum(-1)
        return total

    def fixed(self) -> Values:
        """What the model reads as constants though it could be learnt: pyro.param sites, parameters of a module."""
        own = self.model.named_parameters() if isinstance(self.model, torch.nn.Module) else ()
        values = {name: value.detach() for name, value in own if not name.endswith("_unconstrained")}
        return values | self.held

    def deterministic(self, values: Values) -> Values:
        """The pyro.deterministic sites at one point, and those given by coordinates. Call under settings()."""
        trace, given = self._at(values)
        found = {name: site["value"] for name, site in trace.nodes.items() if is_deterministic(site)}
        return found if given is None else found | given.values

    def coordinates(self, values: Values) -> Values:
        """The coordinates, at one point's values, of the sites that ``centring`` names. Call under settings()."""
        return self.centring.coordinates(self.trace(values).nodes)

    def translated(self, values: Values, degrees: Values) -> tuple[Values, Tensor]:
        """Coordinates at other degrees of the sites that ``centring`` names, at one point, and the log-determinant of
        the way there. Call under settings()."""
        found, own = self.noise(values), self.centring.degrees
        log_det = [(f.log_det(z, own[n]) - f.log_det(z, degrees[n])).sum() for n, (f, z) in found.items()]
        return {n: frame.coordinate(z, degrees[n]) for n, (frame, z) in found.items()}, torch.stack(log_det).sum()

    def noise(self, values: Values) -> dict[str, Any]:
        """Frame and noise, at one point, of each site that ``centring`` names. Call under settings()."""
        return self._at(values)[1].noise


@contextlib.contextmanager
def settings(dtype: torch.dtype, validate: bool) -> Iterator[None]:
    """Set the default dtype and the validation of pyro and torch distributions; restore what was there."""
    before, torch_validates = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(validate):
            torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(before)
        # pyro.validation_enabled would set torch's flag to pyro's, and a user may have set them apart
        torch.distributions.Distribution.set_default_validate_args(torch_validates)


@contextlib.contextmanager
def seeded_in_use(seed: int) -> Iterator[None]:
    """Run with seeded random numbers and leave the user's as they were, on the CPU and on devices in use."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices that are not in use yet
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def cast(value: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    """value with its float tensors in dtype and all its tensors on device, through nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: cast(item, dtype, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(item, dtype, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype, device) for item in value)
    return value


def check_arguments(model: Callable[..., Any], args: tuple, kwargs: dict) -> None:
    """Raise TypeError in one line unless the model can be called with these arguments."""
    if not callable(model):
        raise TypeError(f"model: expected a Pyro model (a callable), got {type(model).__name__}")
    try:
        signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    except (TypeError, ValueError):  # a callable without a readable signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"model: expected arguments for {name}{signature}, got: {error}; pass them after the model"
        ) from None


def by_halves(
    evaluate: Callable[[Values], Any], values: Values, failed: Callable[[Values, Exception], Any]
) -> list[Any]:
    """Results of evaluate over consecutive blocks of rows; a row that raises by itself gives failed(row, error)."""
    try:
        return [evaluate(values)]
    except NUMERICAL as error:
        count = len(next(iter(values.values())))
        if in_vmap():
            raise  # inside someone's vmap, this one row stands for all of theirs
        if count == 1:
            return [failed(values, error)]
    half = count // 2
    parts = {k: v[:half] for k, v in values.items()}, {k: v[half:] for k, v in values.items()}
    return by_halves(evaluate, parts[0], failed) + by_halves(evaluate, parts[1], failed)


def in_vmap() -> bool:
    """Whether torch.func.vmap surrounds the call (there is no public question for it)."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def base_of(fn: Any) -> Any:
    """A distribution without the Independent, Expanded and Masked around it."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        fn = fn.base_dist
    return fn


def is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a node is a pyro.deterministic site, or what a reparametrised site has become (an observed Delta)."""
    if site["type"] != "sample":
        return False
    return bool(site["infer"].get("_deterministic")) or (
        site["is_observed"] and isinstance(base_of(site["fn"]), dist.Delta)
    )


def is_plate(site: dict[str, Any]) -> bool:
    """Whether a trace node is a plate's choice of indices."""
    return site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample"


def is_data(site: dict[str, Any]) -> bool:
    """Whether a trace node is an observed site with data, not a factor."""
    if site["type"] != "sample" or not site["is_observed"] or is_plate(site) or is_deterministic(site):
        return False
    return not site["infer"].get("is_auxiliary") and isinstance(site["value"], Tensor)


def is_factor(site: dict[str, Any]) -> bool:
    """Whether a trace node is a pyro.factor."""
    return site["type"] == "sample" and site["is_observed"] and isinstance(base_of(site["fn"]), dist.Unit)


def _counts(name: str, site: dict[str, Any]) -> bool:
    return not (is_plate(site) or site["infer"].get("_deterministic"))


class _Filled(TorchFunctionMode):
    """Tensors made by torch.zeros and the like, in the dtype of ``like``, become batched as ``like`` is under vmap.

    vmap cannot write batched numbers into a plain tensor, as distributions and models do that fill one entry by entry
    (OrderedLogistic, a filter over time).
    """

    MAKERS = frozenset(
        getattr(owner, prefix + name + suffix)
        for name in ("zeros", "ones", "empty", "full")
        for owner, prefix, suffix in ((torch, "", ""), (torch, "", "_like"), (Tensor, "new_", ""))
    )

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.zero = torch.zeros_like(like.detach().reshape(-1)[:1].sum())

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + self.zero if func in self.MAKERS and out.dtype == self.zero.dtype else out


class _PriorDraws(poutine.messenger.Messenger):
    """Casts draws to the run's dtype (a module may hold float32 priors); names a site whose prior cannot be drawn."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(base_of(msg["fn"]), dist.ImproperUniform) and msg["value"] is None:
            raise NotImplementedError(
                f"site '{msg['name']}': expected a prior that can be drawn from, got ImproperUniform; "
                "write a flat prior as a proper one on the same support with .mask(False), e.g. Normal(0, "
                "1).mask(False)"
            )

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(self.dtype)
