"""Ascent of log p from many starts at once: BFGS in lockstep, then damped Newton with exact Hessians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...running import late
from ...targets.target import Target
from ..estimate.evaluate import hessians, value_and_grad

# the usual ones of quasi-Newton searches (Nocedal & Wright 2006): a smaller second one makes searches exact, at more
# gradients
ARMIJO, WOLFE = 1e-4, 0.9
# least s·y, relative to ‖s‖‖y‖, for a BFGS update: below, rounding could make the inverse Hessian indefinite
CURVATURE = 1e-10
# iterations, after which the worse half of the paths still going ends: fewer end paths that would find other modes
PRUNE_EVERY = 20
LEAST_PATHS = 8  # never fewer than so many by pruning: Pathfinder looks closely at as many


@dataclass(eq=False)
class Iterates:
    """Points x (N, dim) on ascent paths: log p (N,), its gradient, inverse Hessians of −log p, the start's index."""

    x: Tensor
    value: Tensor
    grad: Tensor
    inverse_hessian: Tensor
    path: Tensor

    def __getitem__(self, index: Tensor) -> Iterates:
        return Iterates(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def update(self, index: Tensor, new: Iterates) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name)[index] = getattr(new, name)

    def copy(self) -> Iterates:
        return Iterates(*(getattr(self, name).clone() for name in self.__dataclass_fields__))


def concatenate(parts: list[Iterates]) -> Iterates:
    return Iterates(*(torch.cat([getattr(p, name) for p in parts]) for name in Iterates.__dataclass_fields__))


def bfgs_paths(
    target: Target, starts: Tensor, iterations: int = 150, tolerance: float = 1e-5, prune: bool = True
) -> tuple[Iterates, Iterates]:
    """Maximise log p from each start (N, dim) by BFGS; returns the ends and a thinned record of the paths.

    A path stops when its gain, and that which the local quadratic promises, ½ gᵀHg (in nats, whatever the scaling), are
    below ``tolerance``, when its line search fails, or, with ``prune``, when it is in the worse half of those going
    after every 20 iterations.
    Points are recorded at iterations about 1.3 times apart.
    """
    value, grad = value_and_grad(target, starts)
    norm = torch.linalg.vector_norm(grad, dim=-1).clamp_min(1e-300)
    identity = torch.eye(starts.shape[1], dtype=starts.dtype, device=starts.device)
    at = Iterates(starts.clone(), value, grad, identity / norm.clamp_min(1.0)[:, None, None], torch.arange(len(starts)))
    active = (value > -torch.inf).nonzero()[:, 0]
    record, due = [], 1.0
    for k in range(1, iterations + 1):
        moved, going = _bfgs_step(target, at[active], tolerance, first=k == 1)
        at.update(active, moved)
        if k >= due or not going.any():
            record.append(at[active].copy())
            due = max(k + 1, 1.3 * due)
        active = active[going]
        if not len(active) or late():
            break
        if prune and k % PRUNE_EVERY == 0 and len(active) > LEAST_PATHS:
            active = active[better_half(at.value[active], LEAST_PATHS)]
    return at, concatenate(record) if record else at


def _bfgs_step(target: Target, at: Iterates, tolerance: float, first: bool) -> tuple[Iterates, Tensor]:
    """One iteration for all rows; also whether each row goes on."""
    direction = (at.inverse_hessian @ at.grad.unsqueeze(-1)).squeeze(-1)
    slope = (at.grad * direction).sum(-1)
    x, value, grad, found = line_search(target, at, direction, slope)
    s, y = x - at.x, at.grad - grad
    sy, yy = (s * y).sum(-1), (y * y).sum(-1)
    curved = found & (sy > CURVATURE * torch.linalg.vector_norm(s, dim=-1) * yy.sqrt())
    h = at.inverse_hessian
    if first:  # Nocedal & Wright 2006, eq. 6.20: the scale of the first step's curvature
        scale = torch.where(curved, sy / yy.clamp_min(1e-300), 1.0)[:, None, None]
        h = torch.where(curved[:, None, None], scale * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), h)
    rho = torch.where(curved, 1 / torch.where(curved, sy, 1.0), 0.0)[:, None, None]
    left = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) - rho * s[:, :, None] * y[:, None, :]
    h = left @ h @ left.mT + rho * s[:, :, None] * s[:, None, :]
    gain = torch.maximum(slope / 2, value - at.value)  # where the curvature is far off it promises too little
    going = found & (gain > tolerance)
    return Iterates(x, value, grad, (h + h.mT) / 2, at.path), going


def line_search(target: Target, at: Iterates, direction: Tensor, slope: Tensor, tries: int = 12):
    """Weak-Wolfe bracketing for all rows (Lewis & Overton 2013): t halves between bounds, or doubles without one."""
    t, lo, hi = torch.ones_like(slope), torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    x, value, grad = at.x.clone(), at.value.clone(), at.grad.clone()
    open_ = (slope > 0).nonzero()[:, 0]
    found = torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(tries):
        if not len(open_) or late():
            break
        trial = at.x[open_] + t[open_, None] * direction[open_]
        v, g = value_and_grad(target, trial)
        rises = v >= at.value[open_] + ARMIJO * t[open_] * slope[open_]
        flat = (g * direction[open_]).sum(-1) <= WOLFE * slope[open_]
        better = rises & (v > -torch.inf)
        x[open_[better]], value[open_[better]], grad[open_[better]] = trial[better], v[better], g[better]
        found[open_[better]] = True
        lo[open_] = torch.where(rises, t[open_], lo[open_])
        hi[open_] = torch.where(rises, hi[open_], t[open_])
        t = torch.where(hi < torch.inf, (lo + hi) / 2, 2 * lo)
        open_ = open_[~(rises & flat)]
    return x, value, grad, found


def newton(
    target: Target, ends: Iterates, iterations: int = 10, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Newton ascent from the ends of paths; returns points (N, dim), log p (N,) and Hessians there.

    Directions are V |Λ|⁻¹ Vᵀ g in the eigenbasis of the Hessian, so that saddles repel; steps are halved until log p
    rises. A row is done when its promised gain ½ gᵀ|H|⁻¹g is below ``tolerance`` nats, or when no step helps.
    """
    x, value, grad = ends.x.clone(), ends.value.clone(), ends.grad.clone()
    scale = ends.inverse_hessian.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    hessian = hessians(target, x, scale)
    going = torch.arange(len(x), device=x.device)
    for _ in range(iterations):
        direction = _newton_direction(hessian[going], grad[going])
        promised = (grad[going] * direction).sum(-1) / 2
        going, direction = going[promised > tolerance], direction[promised > tolerance]
        x[going], value[going], grad[going], rose = halved_until_higher(
            target, x[going], value[going], grad[going], direction
        )
        going = going[rose]
        if not len(going) or late():
            break
        hessian[going] = hessians(target, x[going], scale[going])
    return x, value, hessian


def halved_until_higher(
    target: Target, x: Tensor, value: Tensor, grad: Tensor, direction: Tensor, halvings: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, dim), log p and gradient after the longest of the steps direction/2^k at which log p is higher, and where
    there was one (N,)."""
    x, value, grad = x.clone(), value.clone(), grad.clone()
    rose = torch.zeros_like(value, dtype=torch.bool)
    for k in range(halvings):
        left = (~rose).nonzero()[:, 0]
        if not len(left):
            break
        trial = x[left] + 0.5**k * direction[left]
        v, g = value_and_grad(target, trial)
        better = v > value[left]
        rows = left[better]
        x[rows], value[rows], grad[rows], rose[rows] = trial[better], v[better], g[better], True
    return x, value, grad, rose


def better_half(value: Tensor, least: int) -> Tensor:
    """Indices of the better half of the paths by log p (N,), of ``least`` where that is more: the others end."""
    return value.argsort(descending=True)[: max(len(value) // 2, least)]


def _newton_direction(hessian: Tensor, grad: Tensor) -> Tensor:
    """|H|⁻¹ g for each row; 0 where the Hessian is not finite."""
    good = hessian.isfinite().all(-1).all(-1)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(good[:, None, None], hessian, 0.0))
    size = eigenvalues.abs()
    size = size.clamp_min(1e-12 * size.amax(-1, keepdim=True).clamp_min(1e-300))
    direction = (vectors @ ((vectors.mT @ grad.unsqueeze(-1)) / size.unsqueeze(-1))).squeeze(-1)
    return torch.where(good[:, None], direction, 0.0)
