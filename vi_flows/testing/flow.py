"""check_flow: every promise that a flow makes, held against autograd, rounding and itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ..flows.distribution import Flow

LOGDET_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
START_TOLERANCE = 0.1
BATCH_SHAPES = ((), (7,), (2, 3))


def check_flow(
    flow: Flow,
    context: Tensor | None = None,
    *,
    scales: Sequence[float] = (1.0, 10.0, 100.0),
    fresh: bool = False,
    build: Callable[[], Flow] | None = None,
    rows: int = 4,
) -> None:
    """Check a flow: log-determinants, round trips, densities, gradients, vmap, copies and batch shapes.

    Draws from the global generator; leaves the flow as it was, gradients included.

    Parameters
    ----------
    context: (\\*batch, size), where the flow takes one; its rows are what is checked.
    scales: inputs in both directions are drawn from N(0, scale² I).
    fresh: also check that the flow starts near the identity.
    build: makes a new flow of the same architecture, into which the state_dict is loaded; a copy if not given.
    rows: number of inputs for a flow without context.

    Raises
    ------
    AssertionError in one sentence that names the property, what was measured and the tolerance.
    """
    context = None if context is None else context.detach().reshape(-1, context.shape[-1])
    rows = rows if context is None else len(context)
    if fresh:
        check_start(flow)
    for scale in scales:
        points = scale * torch.randn(rows, flow.dim, dtype=flow.dtype, device=flow.device)
        where = f"at inputs of scale {scale:g}"
        rounding = [check_direction(flow, context, points, way, where) for way in ("forward", "inverse")]
        check_vmap(flow, context, points, torch.maximum(*rounding))
    check_samples(flow, context, rows)
    check_gradients(flow, context)
    if flow.dtype == torch.float64 and flow.dim <= 4:
        check_gradcheck(flow, context, rows, "forward")
        check_gradcheck(flow, context, rows, "inverse")
    check_copies(flow, context, rows, build)
    for shape in BATCH_SHAPES:
        check_batch_shape(flow, context, shape)


def check_start(flow: Flow) -> None:
    """max|f(z) − z| <= 0.1 over 1000 draws of z, context ~ N(0, I)."""
    like = {"dtype": flow.dtype, "device": flow.device}
    with torch.no_grad():
        z = torch.randn(1000, flow.dim, **like)
        context = None if flow.context is None else torch.randn(1000, flow.context, **like)
        _within("near identity at the start", flow(context).bijection.forward_and_logdet(z)[0] - z, START_TOLERANCE)


def check_direction(flow: Flow, context: Tensor | None, points: Tensor, direction: str, where: str) -> Tensor:
    """The log-determinant against autograd's Jacobian, and the way back; returns what rounding may cost, (N,)."""
    back = {"forward": "inverse", "inverse": "forward"}[direction]
    with torch.no_grad():
        image, logdet = _map(flow, direction, points, context)
        returned, back_logdet = _map(flow, back, image, context)
    for what, value in (("value", image), ("log-determinant", logdet), ("value of the way back", returned)):
        if not value.isfinite().all():
            raise AssertionError(f"{direction} {what} {where}: not finite at {int((~value.isfinite()).sum())} entries")
    # The truth is the Jacobian of the float64 flow: slogdet in float32 is itself wrong by eps·cond(J).
    jacobian = _jacobian(flow, direction, points, context)
    rounding = _rounding(jacobian, points, image)
    tolerance = LOGDET_TOLERANCE[flow.dtype]
    # Rounding moves the values inside the flow, at which the log-determinant is then taken, by eps·cond(J)·size.
    error = logdet - torch.linalg.slogdet(jacobian)[1]
    _within(f"{direction} log-determinant against autograd's Jacobian {where}", error, tolerance + 10 * rounding)
    _within(f"round trip {direction} then {back} {where}", (returned - points).abs().amax(-1), 100 * rounding)
    both = f"sum of the {direction} and {back} log-determinants {where}"
    _within(both, logdet + back_logdet, tolerance + 100 * rounding)
    return rounding


def check_vmap(flow: Flow, context: Tensor | None, points: Tensor, rounding: Tensor) -> None:
    """Both directions and log_prob, row by row under torch.func.vmap, equal the batched ones."""

    def everything(point: Tensor, row: Tensor | None) -> list[Tensor]:
        q = flow(row)
        return [*q.bijection.forward_and_logdet(point), *q.bijection.inverse_and_logdet(point), q.log_prob(point)]

    names = ["forward value", "forward log-det", "inverse value", "inverse log-det", "log_prob"]
    with torch.no_grad():
        single = vmap(everything, in_dims=(0, None if context is None else 0))(points, context)
        batched = everything(points, context)
    for name, one, many in zip(names, single, batched, strict=True):
        error = ((one - many).abs() / (1 + many.abs())).reshape(len(points), -1).amax(-1)
        _within(f"{name} under vmap against batched", error, LOGDET_TOLERANCE[flow.dtype] + 100 * rounding)


def check_samples(flow: Flow, context: Tensor | None, rows: int) -> None:
    """The log q that comes with a draw is log_prob of the same x, whether the draw is remembered or not."""
    shape = (rows,) if context is None else ()
    x, log_q = flow(context).rsample_and_log_prob(shape)
    remembering = flow(context)
    drawn = remembering.rsample(shape)
    pairs = {"rsample_and_log_prob": (x, log_q), "log_prob of its own draw": (drawn, remembering.log_prob(drawn))}
    for name, (draw, log_q) in pairs.items():
        draw, log_q = draw.detach().clone(), log_q.detach()
        again = flow(context).log_prob(draw).detach()
        rounding = _rounding(_jacobian(flow, "inverse", draw, context), draw, draw)
        tolerance = LOGDET_TOLERANCE[flow.dtype] * (1 + again.abs()) + 100 * rounding * (1 + draw.abs().amax(-1))
        _within(f"log q of {name} against log_prob of a copy", log_q - again, tolerance)


def check_gradients(flow: Flow, context: Tensor | None) -> None:
    """Every parameter has a finite gradient that is not zero, by way of draws and by way of given values."""
    names, parameters = zip(*flow.named_parameters(), strict=True)
    x, log_q = flow(context).rsample_and_log_prob((64,))
    # the last layer's shift moves x and not log q, so a draw is scored as a fit scores it: against a density of x
    of_draws = (log_q + (x - 1).square().sum(-1)).mean()
    of_values = flow(context).log_prob(torch.randn_like(x)).mean()
    for way, loss in (("draws", of_draws), ("given values", of_values)):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                what = "none" if gradient is None else "zero" if not gradient.any() else "not finite"
                raise AssertionError(
                    f"gradient of parameter {name} through {way}: {what}, should be finite and not zero"
                )


def check_gradcheck(flow: Flow, context: Tensor | None, rows: int, direction: str) -> None:
    """Derivatives of the map and its log-determinant in points, context and parameters, by finite differences.

    Parameters move along one random direction: a failing gradcheck goes through every number that it was given.
    """
    module = _Direction(flow, direction)
    start = {name: parameter.detach() for name, parameter in module.named_parameters()}
    ahead = {name: torch.randn_like(value) for name, value in start.items()}

    def function(x: Tensor, context: Tensor | None, step: Tensor) -> tuple[Tensor, Tensor]:
        moved = {name: start[name] + step * ahead[name] for name in start}
        value, logdet = functional_call(module, moved, (x, context))
        return value, logdet + 0 * x.sum(-1)  # gradcheck passes over an output that is cut off from the graph

    x = torch.randn(rows, flow.dim, dtype=flow.dtype, device=flow.device, requires_grad=True)
    context = None if context is None else context.clone().requires_grad_()
    step = x.new_zeros((), requires_grad=True)
    try:
        torch.autograd.gradcheck(function, (x, context, step), fast_mode=True, atol=1e-6, rtol=1e-4)
    except RuntimeError as error:
        raise AssertionError(f"gradcheck of the {direction} map: {error}") from error


def check_copies(flow: Flow, context: Tensor | None, rows: int, build: Callable[[], Flow] | None) -> None:
    """deepcopy, pickle, and the state_dict in a new flow give the same log_prob."""
    loaded = build().to(flow.dtype).to(flow.device) if build is not None else copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.normal_()
        loaded.load_state_dict(flow.state_dict())
        x = torch.randn(rows, flow.dim, dtype=flow.dtype, device=flow.device)
        expected = flow(context).log_prob(x)
        copies = {"deepcopy": copy.deepcopy(flow), "pickle": pickle.loads(pickle.dumps(flow)), "state_dict": loaded}
        for name, other in copies.items():
            _within(f"log_prob after {name}", other(context).log_prob(x) - expected, 0.0)


def check_batch_shape(flow: Flow, context: Tensor | None, shape: tuple[int, ...]) -> None:
    """Shapes of draws and densities, and rows that do not mix, for a context or a value of a batch shape."""
    like = {"dtype": flow.dtype, "device": flow.device}
    with torch.no_grad():
        x = torch.randn(*shape, flow.dim, **like)
        if context is None:
            q, draw = flow(), flow().rsample(shape)
        else:
            context = context[torch.randint(len(context), shape)]
            q = flow(context)
            draw = q.rsample()
            _same("batch_shape of the context", q.batch_shape, shape)
            _same("shape of log_prob of one value", q.log_prob(x.reshape(-1, flow.dim)[0]).shape, shape)
            _same("shape of 5 draws", q.rsample((5,)).shape, (5, *shape, flow.dim))
        _same("shape of a draw", draw.shape, (*shape, flow.dim))
        log_q = q.log_prob(torch.stack([x, x + 1]))
        _same("shape of log_prob", log_q.shape, (2, *shape))
        rows = x.reshape(-1, flow.dim)
        contexts = [None] * len(rows) if context is None else context.reshape(-1, context.shape[-1])
        single = torch.stack([flow(c).log_prob(row) for row, c in zip(rows, contexts, strict=True)])
        tolerance = LOGDET_TOLERANCE[flow.dtype] * (1 + single.abs())
        _within(f"rows one by one against batch shape {shape}", single - log_q[0].reshape(-1), tolerance)


class _Direction(nn.Module):
    """One direction of a flow as a module, so that functional_call reaches its parameters."""

    def __init__(self, flow: Flow, direction: str):
        super().__init__()
        self.flow, self.direction = flow, direction

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return _map(self.flow, self.direction, x, context)


def _map(flow: Flow, direction: str, points: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return getattr(flow(context).bijection, f"{direction}_and_logdet")(points)


def _jacobian(flow: Flow, direction: str, points: Tensor, context: Tensor | None) -> Tensor:
    """(N, dim, dim) by autograd, in float64 from a float64 copy of the flow."""
    exact = copy.deepcopy(flow).double()

    def value(point: Tensor, row: Tensor | None) -> Tensor:
        return _map(exact, direction, point, row)[0]

    rows = None if context is None else context.double()
    in_dims = (0, None if context is None else 0)
    return vmap(jacrev(value), in_dims=in_dims)(points.double(), rows).detach()


def _rounding(jacobian: Tensor, points: Tensor, image: Tensor) -> Tensor:
    """eps · cond(J) · size (N,): what rounding alone may cost (J and the identity together)."""
    singular = torch.linalg.svdvals(jacobian)
    condition = singular.amax(-1).clamp_min(1) / singular.amin(-1).clamp_max(1)
    size = torch.maximum(points.abs().amax(-1), image.abs().amax(-1)).clamp_min(1)
    return torch.finfo(points.dtype).eps * condition * size


def _within(what: str, error: Tensor, tolerance: Tensor | float) -> None:
    tolerance = torch.as_tensor(tolerance, dtype=error.dtype, device=error.device).expand(error.shape)
    excess = torch.where(error.isnan(), torch.inf, error.abs()) - tolerance
    worst = excess.argmax()
    if excess.reshape(-1)[worst] > 0:
        measured, allowed = error.reshape(-1)[worst].abs(), tolerance.reshape(-1)[worst]
        raise AssertionError(f"{what}: error {float(measured):.3g}, tolerance {float(allowed):.3g}")


def _same(what: str, got: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(got) != tuple(expected):
        raise AssertionError(f"{what}: got {tuple(got)}, expected {tuple(expected)}")
