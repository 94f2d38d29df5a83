"""A density over rows, evaluated by recorded programs: one for each number of rows that comes up often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from .pyro_run import NUMERICAL
from .recording import NotRecordedError, Program, TooLargeError, agree, is_recorded

CALLS_BEFORE_RECORDING = 16  # evaluations of one size before it is recorded: about what recording and checking cost
MOST_PROGRAMS = 32  # programs; more sizes come up only by mistake
DISPATCH = 2000  # elements of arithmetic that take as long as dispatching one operation
CAPTURE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Density = Callable[[Tensor], Tensor]


class Captured:
    """fn, (N, D) -> (N,) row by row, run by recorded programs once a number of rows has come up ``wait`` times.

    Values and first derivatives come from a program, checked against fn at other points before it is used; higher
    derivatives, evaluations inside ``torch.func`` transforms and those of a single row come from fn itself. Whether a
    program is used depends on the number and size of earlier calls only. Tensors that fn reads are taken as constants;
    when one of them is changed in place, programs are dropped. Writing by ``.data`` or through NumPy, and binding a
    name to another tensor, go unnoticed: call :meth:`forget` then.

    refused: why fn cannot be captured, or "".
    """

    def __init__(self, fn: Density) -> None:
        self.fn = fn
        self.forget()

    def forget(self) -> None:
        """Drop all programs, as after a change in something that fn reads."""
        self.batches: list[Batch] = []
        self.calls: Counter[tuple[int, bool]] = Counter()
        self.most = math.inf  # rows, from which on evaluations are too large
        self.refused = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"fn": self.fn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fn = state["fn"]
        self.forget()

    def __call__(self, x: Tensor, wait: int = CALLS_BEFORE_RECORDING) -> Tensor:
        """fn(x); the first ``wait`` evaluations of a size are not recorded."""
        if self.refused or not 1 < len(x) < self.most or _is_transformed() or torch.is_inference_mode_enabled():
            return self.fn(x)
        gradient = torch.is_grad_enabled() and x.requires_grad
        batch = self._batch(x, gradient, wait)
        if batch is None:
            return self.fn(x)
        return _Evaluation.apply(x, batch, self.fn) if gradient else batch.run(x)[0]

    def _batch(self, x: Tensor, gradient: bool, wait: int) -> Batch | None:
        fitting = [batch for batch in self.batches if batch.takes(x, gradient)]
        if fitting:
            batch = min(fitting, key=lambda batch: batch.rows)
            if batch.program.current():
                return batch
            self.forget()
        # until it is known whether spare rows cost much, sizes are counted together up to a power of two
        key = len(x) if self.batches else 2 ** math.ceil(math.log2(len(x))), gradient
        self.calls[key] += 1
        if self.calls[key] <= wait or is_recorded():
            return None
        self.calls[key] = 0  # if it fails here, not before as many again
        return self._record(x, gradient)

    def _record(self, x: Tensor, gradient: bool) -> Batch | None:
        """A new program, once it agrees with fn; raises what fn raises for the numbers at x."""
        try:
            batch = Batch(self.fn, x, gradient)
            if batch.program.reads_parameters:
                raise NotRecordedError("it reads tensors that require gradients")
            if not self._agrees(batch, x):
                raise NotRecordedError("recorded operations differ from those of another evaluation")
        except NUMERICAL:
            raise
        except TooLargeError:
            self.most = len(x)
            return None
        except Exception as error:  # dispatch modes meet whatever a model is made of
            self.refused = first_line(error, kind=not isinstance(error, NotRecordedError))
            return None
        self.batches = [*self.batches[1 - MOST_PROGRAMS :], batch]
        return batch

    def _agrees(self, batch: Batch, x: Tensor) -> bool:
        """Whether program and fn agree between the rows of x and three times as far out."""
        between = (x.detach() + x.detach().roll(1, 0)) / 2
        for points in (between, 3 * between):
            try:
                expected, found = directly(self.fn, points, batch.gradient), batch.run(points)
            except NUMERICAL:
                continue  # no density there to compare
            if not agree(found, expected, CAPTURE_TOLERANCE[x.dtype]):
                return False
        return True


class Batch:
    """A program for fn at so many rows, or at fewer: (value,), or (value, gradient)."""

    def __init__(self, fn: Density, x: Tensor, gradient: bool) -> None:
        self.rows, self.gradient = len(x), gradient
        self.dtype, self.device = x.dtype, x.device
        self.program = Program(lambda rows: directly(fn, rows, gradient), x)

    def takes(self, x: Tensor, gradient: bool) -> bool:
        """Whether it can stand in at x, with rows to spare only where their arithmetic is hardly noticed."""
        spare, program = self.rows - len(x), self.program
        fits = spare == 0 or 0 < spare * program.elements < DISPATCH * program.operations * self.rows
        return fits and gradient == self.gradient and x.dtype == self.dtype and x.device == self.device

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The program at x, filled up with its last row."""
        x = x.detach()
        if len(x) == self.rows:
            return self.program(x)
        filled = torch.cat([x, x[-1:].expand(self.rows - len(x), -1)])
        return tuple(result[: len(x)] for result in self.program(filled))


class _Evaluation(torch.autograd.Function):
    """A program's value, with its gradient as the derivative; a derivative of that goes through fn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, fn: Density) -> Tensor:
        value, gradient = batch.run(x)
        ctx.save_for_backward(x, gradient)
        ctx.fn = fn
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return torch.autograd.grad(ctx.fn(x), x, cotangent, create_graph=True)[0], None, None
        return cotangent.unsqueeze(-1) * gradient, None, None


def directly(fn: Density, x: Tensor, gradient: bool) -> tuple[Tensor, ...]:
    """(value,), or (value, gradient), of fn at x (N, dim)."""
    x = x.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        value = fn(x)
        return (value.detach(), *torch.autograd.grad(value.sum(), x)) if gradient else (value,)


def _is_transformed() -> bool:
    """Whether torch.func or the compiler surrounds the call: they work on the function itself."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.compiler.is_compiling()
