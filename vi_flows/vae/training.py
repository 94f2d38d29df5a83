"""Training a VAE: epochs of minibatches, a schedule, early stopping on validation data, and a state to go on from.

Everything random (the order of rows, binarisation, base noise) comes from the seed and the global generator, whose
state is part of :class:`State`: a run that goes on from a saved state is the run that was not interrupted, bit by bit
on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import one_of, whole
from ..errors import DivergedError
from ..flows.distribution import Flow
from ..flows.parameters import Conditioned, Parametric
from ..flows.univariates.univariate import Univariate
from ..inference.train.step import Loss
from .bounds import bound
from .data import Images
from .distributed import ALONE, Workers
from .model import VAE, Terms
from .objectives import OBJECTIVES

OPTIMIZERS = ("adam", "adamax")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("full", "mixed")
MOST_BAD = 5  # steps in a row whose loss or gradient is not finite


@dataclass(frozen=True)
class VAEOptions:
    """How to train.

    Parameters
    ----------
    epochs, batch: passes over the training rows, and rows in a step. draws: K, of q(z|x) for each row.
    objective: "elbo", "stl" (its path gradient), "iwae" or "dreg" (these two with at least 2 draws).
    optimizer, lr, schedule: "adam" or "adamax"; "constant", or "cosine" down to 0 over all epochs.
    warm_up: epochs over which the weight β of the KL rises from beta/warm_up to beta; without, a decoder may never
        begin to use z.
    flow_start: epochs before the flow's layers begin to learn; until then they stay near the identity and q(z|x) is
        diagonal, so that units of z are not lost to a q that adapts faster than the decoder. None: those of warm_up,
        at most half of all.
    beta: 1 for the ELBO.
    free_bits: nats of KL, on average over a batch, that cost nothing (Kingma et al. 2016).
    clip: the largest norm of a gradient; 0 for none.
    patience: epochs after warm-up without a better validation bound, after which training stops; 0: never.
    valid_draws: K of the validation bound (IWAE-K; Burda et al. 2016). seed: of everything random.
    precision: "full", or "mixed": networks in bfloat16 on a GPU. compile: networks by torch.compile.
    """

    epochs: int = 100
    batch: int = 100
    draws: int = 1
    objective: str = "elbo"
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "constant"
    warm_up: int = 0
    flow_start: int | None = None
    beta: float = 1.0
    free_bits: float = 0.0
    clip: float = 0.0
    patience: int = 0
    valid_draws: int = 10
    seed: int = 0
    precision: str = "full"
    compile: bool = False

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch", 1), ("draws", 1), ("valid_draws", 1)):
            whole(name, getattr(self, name), least)
        for name in ("warm_up", "patience", "seed"):
            whole(name, getattr(self, name), 0)
        if self.flow_start is None:
            object.__setattr__(self, "flow_start", min(self.warm_up, self.epochs // 2))
        if whole("flow_start", self.flow_start, 0) >= self.epochs:
            given = f"expected less than the {self.epochs} epochs, got {self.flow_start}"
            raise ValueError(f"flow_start: {given}; the flow would never learn")
        for name, least in (("lr", 1e-300), ("beta", 0.0), ("free_bits", 0.0), ("clip", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                expected = "a positive number" if least else "a number of at least 0"
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name, known in (
            ("objective", OBJECTIVES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            one_of(name, getattr(self, name), known)
        if self.objective in ("iwae", "dreg"):
            whole("draws", self.draws, 2, f"with one draw {self.objective!r} is the ELBO")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class NegativeBound(Loss):
    """A step's loss as a module, so that it can be distributed: forward(x, noise, β) -> loss, and what it is made of.

    The loss is minus the objective, averaged over ``rows``, those of the whole batch, of which x are a process's share.
    """

    def __init__(self, vae: VAE, options: VAEOptions, processes: Workers = ALONE):
        super().__init__()
        self.vae, self.free_bits, self.processes = vae, options.free_bits, processes
        self.objective, self.path = OBJECTIVES[options.objective]

    def forward(self, x: Tensor, noise: Tensor, beta: float, rows: int) -> tuple[Tensor, Tensor]:
        terms, count = self.vae(x, noise, self.path), self.processes.count
        value = self.objective(terms, beta).sum() / rows
        if self.free_bits:
            kl = (terms.log_q - terms.log_prior).mean(0).sum() / rows
            free = self.processes.total(kl.detach()) < self.free_bits
            value = value + beta * torch.where(free, kl - self.free_bits / count, 0.0)
        return -value * count, sums(terms)  # gradients are averaged over processes: the sum over them is meant


def sums(terms: Terms) -> Tensor:
    """Over rows: the ELBO, log p(x|z), KL and their number, without a graph."""
    likelihood = terms.log_likelihood.detach().mean(0)
    kl = (terms.log_q - terms.log_prior).detach().mean(0)
    return torch.stack([(likelihood - kl).sum(), likelihood.sum(), kl.sum(), likelihood.new_tensor(len(likelihood))])


@dataclass
class State:
    """Where training is: all that a further step depends on, beside the options and the data."""

    vae: VAE
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # finished
    step: int = 0  # in this epoch, finished
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)  # of this epoch, as in sums()
    seconds: float = 0.0  # of training so far
    bad: int = 0  # steps in a row whose gradient was not finite
    history: list[dict[str, float]] = field(default_factory=list)  # a record for each epoch

    @property
    def best(self) -> tuple[int, float]:
        """The epoch of the best validation bound, and the bound; (0, −inf) before there is one."""
        found = max(self.history, key=lambda record: record["valid_iwae"], default=None)
        return (0, -math.inf) if found is None else (int(found["epoch"]), found["valid_iwae"])


def begin(vae: VAE, options: VAEOptions) -> State:
    """The state before the first step."""
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.Adamax
    fused = {"fused": True} if options.optimizer == "adam" else {"eps": 1e-7}
    return State(vae, kind(parameter_groups(vae, options.lr), lr=options.lr, **fused))


def parameter_groups(vae: VAE, lr: float) -> list[dict[str, Any]]:
    """Parameters by their rates, ``factor`` times lr, and by whether they are ``late``: see Options.flow_start.

    Weights of the flow's heads and conditioners act divided by √fan-in: at √fan-in times the rate they learn as an
    ordinary linear layer's do (at the bare rate heads lost 7 to 17 nats in the first epochs, and an IAF half of what it
    gains over a Gaussian).
    """
    factors, late = {}, _late(vae.posterior)
    for module in vae.modules():
        if isinstance(module, Conditioned):
            factors |= module.rates()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p in vae.parameters():
        groups.setdefault((factors.get(p, 1.0), p in late), []).append(p)
    return [{"params": p, "factor": f, "late": waits, "lr": lr * f} for (f, waits), p in groups.items()]


def _late(flow: Flow) -> set[nn.Parameter]:
    """Parameters of all layers but the elementwise ones, by which alone q is diagonal; none where there are none."""
    plain = [isinstance(layer, Parametric) and isinstance(layer.maths, Univariate) for layer in flow.layers]
    layers = [layer for layer, each in zip(flow.layers, plain, strict=True) if any(plain) and not each]
    return {p for layer in layers for p in layer.parameters()}


def train(
    state: State,
    images: Images,
    options: VAEOptions,
    report: Callable[[State, int], None] = lambda state, steps: None,
    save: Callable[[State], None] = lambda state: None,
    stop: Callable[[], bool] = lambda: False,
    processes: Workers = ALONE,
) -> bool:
    """Train from a state until its epochs are done or patience ends; returns whether it finished.

    report: called after every step with the number of steps in an epoch. save: after every epoch, and where ``stop``
    asks to end. processes: those that share the work. Raises DivergedError where losses stay non-finite.
    """
    steps = math.ceil(len(images.train) / options.batch)
    if options.precision == "mixed" and state.vae.posterior.device.type != "cuda":
        raise ValueError(f'precision: expected "full" on {state.vae.posterior.device}, got "mixed", which needs a GPU')
    if options.compile:
        state.vae.encoder.compile()
        state.vae.decoder.compile()
    state.vae.mixed = options.precision == "mixed"
    loss = processes.module(NegativeBound(state.vae, options, processes))
    while state.epoch < options.epochs and not out_of_patience(state, options):
        for x in _batches(state, images, options):
            began = time.monotonic()
            asked = _step(state, loss, x, steps, options, processes, stop())
            state.seconds += time.monotonic() - began
            report(state, steps)
            if asked:
                save(state)
                return False
        _finish_epoch(state, images, options, processes)
        save(state)
    return True


def out_of_patience(state: State, options: VAEOptions) -> bool:
    begun = max(options.warm_up, options.flow_start)
    return bool(options.patience) and state.epoch - max(state.best[0], begun) >= options.patience


def _batches(state: State, images: Images, options: VAEOptions) -> Iterator[Tensor]:
    """The rows of this epoch that are left, in the epoch's own order, as a step takes them."""
    order = torch.randperm(
        len(images.train), generator=torch.Generator().manual_seed(1_000_003 * options.seed + state.epoch)
    )
    device = next(state.vae.parameters()).device
    for index in order.split(options.batch)[state.step :]:
        yield images.values(images.train[index], training=True).to(device)


def _step(
    state: State, loss: nn.Module, x: Tensor, steps: int, options: VAEOptions, processes: Workers, stop: bool
) -> bool:
    """One step; one whose gradient is not finite changes nothing. Returns whether any process was asked to stop."""
    state.vae.train()
    epoch = state.epoch + state.step / steps
    for group in state.optimizer.param_groups:
        waiting = group["late"] and epoch < options.flow_start
        group["lr"] = 0.0 if waiting else learning_rate(options, epoch) * group["factor"]
    noise = state.vae.posterior.base.noise((options.draws, len(x)))
    state.optimizer.zero_grad(set_to_none=True)
    value, parts = loss(processes.share(x), processes.share(noise, 1), kl_weight(options, epoch), len(x))
    value.backward()
    *parts, asked = processes.total(torch.cat([parts, parts.new_tensor([stop])])).tolist()
    norm = nn.utils.clip_grad_norm_(state.vae.parameters(), options.clip or math.inf)
    if bool(norm.isfinite()):
        state.optimizer.step()
        state.totals = [total + part for total, part in zip(state.totals, parts, strict=True)]
        state.bad = 0
    else:
        state.bad += 1
    state.step += 1
    if state.bad == min(MOST_BAD, steps):
        where = f"{state.bad} steps in a row, in epoch {state.epoch + 1}"
        raise DivergedError(f"train: gradients were not finite in {where}; lower lr=, or clip= gradients")
    return asked > 0


def learning_rate(options: VAEOptions, epoch: float) -> float:
    if options.schedule == "constant":
        return options.lr
    return options.lr * 0.5 * (1 + math.cos(math.pi * min(epoch / options.epochs, 1.0)))


def kl_weight(options: VAEOptions, epoch: float) -> float:
    """β of an epoch (counted from 0): it rises linearly over ``warm_up`` epochs, as in van den Berg et al. 2018."""
    return options.beta * min((math.floor(epoch) + 1) / options.warm_up, 1.0) if options.warm_up else options.beta


def _finish_epoch(state: State, images: Images, options: VAEOptions, processes: Workers) -> None:
    """Validate, each process its share of rows, and record the epoch."""
    valid = images.values(images.valid)
    valid_elbo, valid_iwae = bound(state.vae, valid, options.valid_draws, options.seed, processes=processes)
    elbo, likelihood, kl, count = state.totals
    state.history.append(
        {
            "epoch": state.epoch + 1,
            "elbo": elbo / count,
            "reconstruction": likelihood / count,
            "kl": kl / count,
            "beta": kl_weight(options, state.epoch),
            "valid_elbo": float(valid_elbo.mean()),
            "valid_iwae": float(valid_iwae.mean()),
            "seconds": state.seconds,
        }
    )
    state.epoch, state.step, state.totals = state.epoch + 1, 0, [0.0] * 4
