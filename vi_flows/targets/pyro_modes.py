"""How a batch of a model is evaluated: vmap, a plate of particles, or a loop, whichever agrees with single rows."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import first_line
from .pyro_run import NUMERICAL, Values

if TYPE_CHECKING:
    from .pyro_model import PyroModel

TRIAL_SCALE = 0.5
NEAR_TRIALS, PRIOR_TRIALS = 5, 2
AGREES = "agrees with single evaluations"
ROWS_OF_A_FIT = 600_000  # gradients, about, by which a loop's time is foretold: 1,500 steps of 256, and what is around
# vmap against single evaluations, relative: above the rounding of an ill-conditioned Cholesky, below a wrong shape
MODE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def choose_mode(model: PyroModel) -> None:
    """The first of vmap and particle plate that agrees with single evaluations; else the loop, with a warning."""
    with torch.no_grad(), model._run.settings():
        values, singles = _trial(model)
        reasons: dict[str, str] = {}
        for model.mode, model._run.fills in (("vmap", False), ("vmap", True), ("plate", False)):
            try:
                batch = model._log_joint(values)
            except Exception as error:  # anything may come out of a model that was not written for it
                reasons.setdefault(model.mode, f"{model.mode}: {first_line(error)}")
                continue
            tolerance = MODE_TOLERANCE[model.dtype]
            if torch.allclose(batch, singles, rtol=tolerance, atol=tolerance, equal_nan=True):
                filled = f"{AGREES}; tensors that it fills join the batch"
                model.mode_reason = filled if model._run.fills else "; ".join(reasons.values()) or AGREES
                return
            reasons.setdefault(model.mode, f"{model.mode}: differs from single evaluations")
        model.mode, model.mode_reason = "loop", "; ".join(reasons.values())
        seconds = _seconds_a_row(model, values)
    warnings.warn(
        f"PyroModel: evaluating row by row, {1e3 * seconds:.2g} ms each, so that a default fit takes some "
        f"{max(seconds * ROWS_OF_A_FIT / 60, 1):.0f} minutes ({model.mode_reason}); write what vmap refuses as "
        "operations on whole tensors, or pass max_seconds= (or fewer steps=, particles=)",
        stacklevel=4,
    )


def _seconds_a_row(model: PyroModel, values: Values) -> float:
    """The time that log p of one row takes, with its gradient, over the rows of values."""
    values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    began = time.perf_counter()
    with torch.enable_grad(), contextlib.suppress(Exception):  # what cannot be differentiated is refused later
        torch.autograd.grad(model._log_joint(values).sum(), list(values.values()), allow_unused=True)
    return (time.perf_counter() - began) / len(next(iter(values.values())))


def _trial(model: PyroModel) -> tuple[Values, Tensor]:
    """Latent values at a few points and their log p one by one; refuses a model that is random at fixed values."""
    near, drawn = TRIAL_SCALE * torch.randn(NEAR_TRIALS, model.dim), model.prior(PRIOR_TRIALS)
    x = torch.cat([near.to(drawn), drawn])
    values, _ = model._transform(x)
    kept, singles, error = [], [], None
    for i in range(len(x)):
        row = {k: v[i] for k, v in values.items()}
        try:
            singles.append(model._run.log_joint(row))
        except NUMERICAL as caught:
            error = caught
            continue
        kept.append(i)
        if len(kept) == 1:
            _check_repeatable(model, singles[0], model._run.log_joint(row))
    if not kept:
        raise ValueError(
            f"model: expected a log density at {len(x)} trial points, got {first_line(error)} at each"
        ) from error
    return {k: v[kept] for k, v in values.items()}, torch.stack(singles)


def _check_repeatable(model: PyroModel, a: Tensor, b: Tensor) -> None:
    if not torch.allclose(a, b, rtol=1e-4 if model.dtype == torch.float32 else 1e-9, atol=0.0, equal_nan=True):
        raise ValueError(
            f"model: expected the same log density at the same values, got {float(a):.6g} and {float(b):.6g}; "
            "draw every random number by pyro.sample, so that it has a name"
        )
