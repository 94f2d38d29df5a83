"""One training step as a pure function of (flat parameters, noise), and faster ways to run it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import first_line
from ...flows.distribution import Flow
from ...running import seconds_of
from ...targets.recording import NotRecordedError, Program, agree
from ...targets.target import Target
from ..estimate.weights import log_weights
from .objectives import Objective, elbo

STEPS_BEFORE_RECORDING = 8  # steps before one is recorded: about what recording takes
# of a recorded step with the eager one, relative to the largest entry: rounding of ill-conditioned p
STEP_TOLERANCE = 1e-6

Pair = tuple[Tensor, Tensor]


class Loss(nn.Module):
    """What a training step makes small, as a module, so that ``functional_call`` makes it pure in its parameters.

    forward(batch, ...) -> (loss, watched): a scalar, and values without a graph by which training is watched:
    log-weights, row by row, or sums over rows. failed_rows: at how many rows a matrix routine has raised so far.
    """

    failed_rows = 0


class ReverseKL(Loss):
    """forward(noise) -> (loss, log_w): the negative objective over the draws of q with finite log-weights.

    The path gradient belongs to the ELBO (in other objectives it is biased: use their own estimators).
    """

    def __init__(self, flow: Flow, target: Target, objective: Objective = elbo, path: bool = False):
        super().__init__()
        if path and objective is not elbo:
            raise ValueError("path: the path gradient belongs to the ELBO; use path=False with any other objective")
        self.flow, self.target, self.objective, self.path = flow, target, objective, path

    @property
    def failed_rows(self) -> int:
        return self.target.failed_rows

    def forward(self, noise: Tensor) -> Pair:
        log_w = log_weights(self.flow, self.target, noise, self.path).log_w
        alive = log_w.detach() > -torch.inf
        mean = log_w.detach().where(alive, 0.0).sum() / alive.sum().clamp_min(1)
        return -self.objective(torch.where(alive, log_w, mean)), log_w.detach()


class Flat:
    """A module's trainable parameters as one vector, and the vector as named views."""

    def __init__(self, module: nn.Module):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names, self.shapes = [n for n, _ in named], [p.shape for _, p in named]
        self.vector = torch.cat([p.detach().reshape(-1) for _, p in named]) if named else torch.zeros(0)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([shape.numel() for shape in self.shapes])
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    @torch.no_grad()
    def store(self, module: nn.Module, vector: Tensor) -> None:
        for name, value in self.views(vector).items():
            module.get_parameter(name).copy_(value)


class Gradient:
    """(gradient, watched) of a loss at (vector, batch): eagerly, then as recorded operations, or compiled ones.

    A step is recorded once it has run ``STEPS_BEFORE_RECORDING`` times, from the first if it is to be compiled, and
    checked against the eager one on another vector and another batch. Where a recorded step raises (a Cholesky, say)
    the eager one decides.

    refused: why steps cannot be recorded, or "". note: why they are not compiled although asked to be, or "".
    """

    def __init__(self, loss: Loss, flat: Flat, record: bool = True, compiled: bool = False):
        self.loss, self.flat = loss, flat
        self.record, self.compiled = record or compiled, compiled
        self.program: Program | None = None
        self.run: Callable[[Tensor, Tensor], Pair] | None = None
        self.refused = self.note = ""
        self.calls = 0

    def __call__(self, vector: Tensor, batch: Tensor) -> Pair:
        self.calls += 1
        if self.run is None and self.record and (self.compiled or self.calls > STEPS_BEFORE_RECORDING):
            self.calls = 0
            self._record(vector.detach(), batch)
        if self.run is None:
            return self.eagerly(vector, batch)
        return self._recorded(vector, batch) or self.eagerly(vector, batch)

    def eagerly(self, vector: Tensor, batch: Tensor) -> Pair:
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            loss, watched = functional_call(self.loss, self.flat.views(vector), (batch,))
            (gradient,) = torch.autograd.grad(loss, vector)
        return gradient, watched

    def _recorded(self, vector: Tensor, batch: Tensor) -> Pair | None:
        """By the recorded operations; None where they raise, or where compiling has taken out what would have."""
        if not self.program.current():
            self.run = None
            return None
        try:
            with torch.no_grad():
                gradient, watched = self.run(vector.detach(), batch)
        except RuntimeError:  # LinAlgError is one
            return None
        return (gradient, watched) if not self.compiled or bool(gradient.isfinite().all()) else None

    def _record(self, vector: Tensor, batch: Tensor) -> None:
        failed = self.loss.failed_rows
        try:
            other = vector * (1 + 1e-3), batch.flip(0)
            self.program = Program(self.eagerly, vector, batch, traceable=self.compiled)
            expected = self.eagerly(*other)
            if self.loss.failed_rows > failed:
                return  # these operations go around a row that failed: record another step
            run = _compile(self.program.run, vector, batch) if self.compiled else self.program
            with torch.no_grad():
                if not agree(run(*other), expected, STEP_TOLERANCE):
                    raise NotRecordedError("it differs from the eager step")
            self.run = run
        except Exception as error:  # what a target or a compiler may raise is not known; the eager step stands
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        reason = first_line(error, kind=not isinstance(error, NotRecordedError))
        if not self.compiled:
            self.refused, self.record = reason, False
            return
        self.compiled, self.note = False, f"compile: the training step was not compiled: {reason}"
        warnings.warn(self.note, stacklevel=2)


def _compile(run: Callable[..., Pair], vector: Tensor, noise: Tensor) -> Callable[[Tensor, Tensor], Pair]:
    """The operations fused into machine code by TorchInductor, in this process."""
    import torch._inductor
    import torch._inductor.config

    graph = torch.fx.symbolic_trace(run)
    with torch._inductor.config.patch(compile_threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._inductor.compile(graph, [vector, noise])


def step_seconds(flow: Flow, target: Target, particles: int) -> float:
    """Seconds of one training step, run eagerly: recorded steps are faster."""
    flow = copy.deepcopy(flow)

    def step() -> None:
        log_w = log_weights(flow, target, particles, path=True).log_w
        if log_w.requires_grad:
            log_w.sum().backward()

    return seconds_of(step)
