"""Ascent of log p from many starts at once: BFGS in lockstep, then damped Newton with exact Hessians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..targets.target import Target
from ..targets.values import BELIEVED
from .clock import late
from .weights import BLOCK

ARMIJO, WOLFE = 1e-4, 0.9
CURVATURE = 1e-10  # least s·y, relative to ‖s‖‖y‖, for a BFGS update
STEPS = (1e-2, 1e-4, 1e-6)  # in sd, over which gradients are differenced to see whether second derivatives are right
TRIED, NEAR = 4, 0.1  # points at which that is looked at, and how far off, relatively, they may be at one of them
PRUNE_EVERY = 20  # iterations, after which the worse half of the paths still going ends
PATHS = 8  # never fewer than so many by pruning


def value_and_grad(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p (N,) and its gradient (N, dim), in blocks; rows without values to believe give −inf and 0."""
    values, grads = [], []
    for rows in x.detach().split(BLOCK):
        rows = rows.clone().requires_grad_()
        with torch.enable_grad():
            value = target.log_prob(rows)
            (grad,) = torch.autograd.grad(value.sum(), rows)
        values.append(value.detach())
        grads.append(grad)
    value, grad = torch.cat(values), torch.cat(grads)
    good = value.isfinite() & (value <= BELIEVED) & grad.isfinite().all(-1)
    return torch.where(good, value, -torch.inf), torch.where(good[:, None], grad, 0.0)


def hessians(target: Target, x: Tensor, scale: Tensor) -> Tensor:
    """Hessians of log p at the rows of x (N, dim) -> (N, dim, dim): exact, by one backward pass for each coordinate.

    Rows where that is not finite (``logaddexp`` of far apart terms has no second derivative in torch) are differenced:
    central differences of the gradient, over steps of 1e-3 times ``scale`` (N, dim), about the sd of each coordinate.
    So are all rows of a target that torch can differentiate only once (``torch.cdist``, say).
    """
    if _has_second_derivatives(target, x, scale):
        grad, leaf = _gradient_with_graph(target, x)
        hessian = torch.stack([_gradient(grad[:, i].sum(), leaf) for i in range(x.shape[1])], -2).detach()
    else:
        hessian = x.new_full((*x.shape, x.shape[1]), torch.nan)
    bad = (~hessian.isfinite().all(-1).all(-1)).nonzero()[:, 0]
    if len(bad):
        hessian[bad] = _differenced(target, x[bad], 1e-3 * scale[bad])
    return (hessian + hessian.mT) / 2


def _has_second_derivatives(target: Target, x: Tensor, scale: Tensor) -> bool:
    """Whether H v by autograd is what gradients differ by along v, at some points near x and for some step.

    An operation that torch differentiates once either raises, or passes for a constant without a word.
    """
    generator = torch.Generator().manual_seed(0)
    noise, v = (torch.randn(2, *x[:TRIED].shape, generator=generator, dtype=torch.float64)).to(x)
    v, at = scale[:TRIED] * v, x[:TRIED] + 0.1 * scale[:TRIED] * noise  # off any kink that an optimum lies on
    try:
        grad, leaf = _gradient_with_graph(target, at)
        product = _gradient((grad * v).sum(), leaf)
    except RuntimeError:
        return False
    steps = torch.tensor(STEPS).to(x)[:, None, None]
    _, grads = value_and_grad(target, torch.stack([at + steps * v, at - steps * v]).reshape(-1, x.shape[1]))
    ahead, behind = grads.reshape(2, len(STEPS), *at.shape)
    differences = (ahead - behind) / (2 * steps)
    size = torch.linalg.vector_norm(scale[:TRIED] * differences, dim=-1)
    off = torch.linalg.vector_norm(scale[:TRIED] * (product - differences), dim=-1)
    return not bool((off > NEAR * size).all())


def _gradient_with_graph(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """∇log p (N, dim) at a leaf x (N, dim), and the leaf."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(target.log_prob(leaf).sum(), leaf, create_graph=True)
    return grad, leaf


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """d value / d leaf, 0 where value does not depend on it (the gradient of a linear log density)."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _differenced(target: Target, x: Tensor, step: Tensor) -> Tensor:
    """(∇log p(x + hᵢeᵢ) − ∇log p(x − hᵢeᵢ)) / 2hᵢ as row i, for all rows of x and steps h (N, dim)."""
    n, dim = x.shape
    offsets = torch.diag_embed(step)
    points = torch.stack([x[:, None] + offsets, x[:, None] - offsets])
    _, grad = value_and_grad(target, points.reshape(-1, dim))
    ahead, behind = grad.reshape(2, n, dim, dim)
    return (ahead - behind) / (2 * step.unsqueeze(-1))


@dataclass
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
        if prune and k % PRUNE_EVERY == 0 and len(active) > PATHS:
            active = active[at.value[active].argsort(descending=True)[: max(len(active) // 2, PATHS)]]
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
        left = torch.arange(len(going), device=x.device)
        moved = torch.zeros_like(left, dtype=torch.bool)
        for halvings in range(10):
            if not len(left):
                break
            rows = going[left]
            trial = x[rows] + 0.5**halvings * direction[left]
            v, g = value_and_grad(target, trial)
            better = v > value[rows]
            x[rows[better]], value[rows[better]], grad[rows[better]] = trial[better], v[better], g[better]
            moved[left[better]] = True
            left = left[~better]
        going = going[moved]
        if not len(going) or late():
            break
        hessian[going] = hessians(target, x[going], scale[going])
    return x, value, hessian


def _newton_direction(hessian: Tensor, grad: Tensor) -> Tensor:
    """|H|⁻¹ g for each row; 0 where the Hessian is not finite."""
    good = hessian.isfinite().all(-1).all(-1)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(good[:, None, None], hessian, 0.0))
    size = eigenvalues.abs()
    size = size.clamp_min(1e-12 * size.amax(-1, keepdim=True).clamp_min(1e-300))
    direction = (vectors @ ((vectors.mT @ grad.unsqueeze(-1)) / size.unsqueeze(-1))).squeeze(-1)
    return torch.where(good[:, None], direction, 0.0)
