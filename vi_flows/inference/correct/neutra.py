"""Hamiltonian chains by Pyro's kernels in a flow's latent space, side by side, so that they are evaluated together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import first_line
from ...targets.pyro_run import settings as pyro_settings
from ...targets.recording import NotRecordedError, Program, agree
from ..estimate.evaluate import value_and_grad
from ..judge.latent import LENGTH

# of recorded with direct values, relative to the largest entry: rounding of ill-conditioned p; higher, and chains walk
# another density
RECORDING = 1e-6
WALK_EVERY = 10  # transitions, between which scales are moved, where these are: the more, the slower a neck is walked
DEPTH = 8  # of NUTS's trees: at most 2⁸ leapfrog steps in a transition, of HMC too

Ask = Callable[..., tuple[Tensor, ...]]


class Potential:
    """U(z) = −log p(f(z)) − log|det df/dz| and its gradient, (N, dim) -> (N,), (N, dim), for N up to len(starts).

    One recorded program, where that agrees with direct evaluation about the starts (C, dim). A point where the density
    is not finite or has no gradient counts as density 0: U = +inf.
    refused: why there is no program, or "".
    """

    def __init__(self, log_prob: Callable[[Tensor], Tensor], starts: Tensor):
        self.log_prob, self.rows, self.refused = log_prob, len(starts), ""
        self.program: Program | None = None
        try:
            program = Program(self.directly, starts)
            for z in (starts, (starts + starts.roll(1, 0)) / 2, 2 * starts):
                if not agree(program(z), self.directly(z), RECORDING):
                    raise NotRecordedError("recorded operations differ from those of another evaluation")
            self.program = program
        except Exception as error:  # dispatch modes meet whatever a target is made of
            self.refused = first_line(error, kind=False)

    def directly(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(self, z)
        return -value, -gradient

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.program is not None and self.program.current():
            try:
                value, gradient = self.program(torch.cat([z, z[-1:].expand(self.rows - len(z), -1)]))
                return value[: len(z)], gradient[: len(z)]
            except RuntimeError:  # a Cholesky, say: the target goes around the row at fault
                pass
        return self.directly(z)


@dataclass(frozen=True, eq=False)
class LatentChain:
    """One chain's states z (draws, dim) after the warm-up, and what its kernel tells of itself."""

    z: Tensor
    divergences: int
    acceptance: float
    step: float


def chains(
    method: str,
    potential: Potential,
    starts: Tensor,
    draws: int,
    warmup: int,
    advance: Callable[[], None],
    between: Callable[[Tensor], Tensor] | None = None,
) -> list[LatentChain]:
    """A chain from each row of starts (C, dim) by "nuts" or "hmc"; ``advance`` is called at each transition.

    between: a move of all chains' z (C, dim) that leaves exp(−U) as it is, made after every ``WALK_EVERY``-th
        transition.
    """

    def worker(start: Tensor) -> Callable[[Ask], LatentChain]:
        return lambda ask: _chain(method, ask, start, draws, warmup, advance, between is not None)

    with pyro_settings(torch.get_default_dtype(), validate=False):
        return together([worker(start) for start in starts], potential, lambda z: (between(z),))


def _chain(
    method: str, ask: Ask, start: Tensor, draws: int, warmup: int, advance: Callable[[], None], between: bool
) -> LatentChain:
    kernel = _kernel(method, lambda values: _Evaluation.apply(values["z"], ask))
    kernel.initial_params = values = {"z": start.clone()}
    kernel.setup(warmup)
    states = []
    for k in range(warmup + draws):
        values = kernel.sample(values)
        if between and k >= warmup and k % WALK_EVERY == 0:  # in a neck the step size would go to what it asks for
            values = {"z": ask(values["z"].detach(), 1)[0]}
            kernel.clear_cache()  # of the potential and its gradient, at where it was
        states.append(values["z"].detach().clone())
        advance()
    told = kernel.diagnostics()
    accepted = round(float(told["acceptance rate"]), 3)
    return LatentChain(torch.stack(states[warmup:]), len(told["divergences"]), accepted, float(kernel.step_size))


def _kernel(method: str, potential: Callable[[dict[str, Tensor]], Tensor]) -> Any:
    from pyro.infer.mcmc import HMC, NUTS

    if method == "nuts":
        return NUTS(potential_fn=potential, max_tree_depth=DEPTH)

    class BoundedHMC(HMC):
        """Trajectories of LENGTH, a little more than a quarter of a normal's period, as near as whole steps come."""

        @property
        def num_steps(self) -> int:
            return min(max(round(LENGTH / self.step_size), 1), 2**DEPTH)

    return BoundedHMC(potential_fn=potential, trajectory_length=LENGTH)


class _Evaluation(torch.autograd.Function):
    """The value that ``ask`` gives at one point z (dim,), with the gradient that it gives as the derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, ask: Ask) -> Tensor:
        value, gradient = ask(z.detach())
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent * ctx.saved_tensors[0], None


def together(workers: Sequence[Callable[[Ask], Any]], *evaluate: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Any]:
    """Results of functions of ``ask``: (z (dim,), k) -> row of evaluate[k] (the first, unless said), which answers what
    all of them ask in one call. Of several, one is called where no question to those before it is open.

    A kernel asks for one point at a time, deep inside its recursion, and a program takes hardly longer for several
    points than for one. So each function runs in a thread until it asks, one at a time and in a fixed order: random
    numbers come as in one thread, and the results depend on the seed alone. Raises what a function raises.
    """
    threads = [_Worker(worker) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        going = ready = threads
        while going:
            for thread in ready:
                thread.proceed()
            going = [thread for thread in going if not thread.done]
            if going:
                first = min(thread.kind for thread in going)
                ready = [thread for thread in going if thread.kind == first]
                answers = evaluate[first](torch.stack([thread.asked for thread in ready]))
                for thread, *row in zip(ready, *answers, strict=True):
                    thread.answer = tuple(row)
        return [thread.result for thread in threads]
    finally:
        for thread in threads:
            thread.stop()


class _Stopped(Exception):
    """Ends a worker whose answer will not come."""


class _Worker(threading.Thread):
    """A thread that runs between ``proceed`` and the next question only, while the caller waits."""

    def __init__(self, fn: Callable[[Ask], Any]):
        super().__init__(daemon=True)
        self.fn, self.done, self.stopped = fn, False, False
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.asked = self.answer = self.result = None
        self.kind = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        self.go.acquire()
        try:
            self.result = None if self.stopped else self.fn(self.ask)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def ask(self, z: Tensor, kind: int = 0) -> tuple[Tensor, ...]:
        self.asked, self.kind = z, kind
        self.back.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped
        return self.answer

    def proceed(self) -> None:
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.stopped = True
        self.go.release()
        if self.ident is not None:
            self.join()
