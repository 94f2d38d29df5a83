"""Whether p can be normalised: rays along which log p does not fall as a proper density must."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...targets.target import Target
from ...targets.values import as_computed
from ..estimate.evaluate import in_blocks, value_and_grad
from ..estimate.weights import Weights
from ..locate.gaussian import Gaussians

DISTANCES = tuple(10.0**k for k in range(1, 13))  # further out, what is added to a coordinate of size 1 is rounded
OFFSET = 0.3  # of the rays' origin: through a point of no symmetry, where a hierarchy's effects are not all equal
SLOPE = -1.0  # of log p in the logarithm of the distance: 1/distance has no finite integral
# below SLOPE, up to which a slope between two distances may be that of 1/distance times what varies slowly; a sentence
# hangs on it, no claim. Chosen, not measured
SLACK = 0.02
RISING = 1e-6  # from which slope on log p rises, by more than rounding does: only the words of a sentence hang on it
WITHIN = 200.0  # nats of the highest log p seen: a plateau below is where arithmetic was kept from overflowing
NAMED_RAYS = 3  # in one sentence: for reading only
COMBINED = 10.0 ** torch.arange(1, 7, dtype=torch.float64)  # reaches of the draws, along combinations of coordinates:
# these are exact to some ten digits, so that further out they leave a valley that they run along
FURTHEST = 4  # draws, of each kind, to which directions are looked along: of an improper target any of them does
# widest directions of the draws, in their own units and in standard deviations. Chosen for its time: with fewer, an
# improper combination may go unnamed
PRINCIPAL = 3
# nats below the highest log p, from where a draw is far out because the proposal is, not the target: of 1,000
# dimensions more are usual, and directions to such draws name nothing. Chosen, not measured
HIGH = 20.0
# of the largest singular value of scores, below which log p does not change along a direction at all: well above what
# rounding leaves in float64; lower, and symmetries go unnamed
NULL = 1e-7
MIDDLE = 4000  # draws, about, that tell the width of their middle and their widest directions: to a few percent
MOST_DIMS = 1000  # up to which singular vectors are looked along: they take seconds there
COEFFICIENTS = 4  # of a combination that a sentence shows: for reading only
# of the largest coefficient, that a sentence shows; from where on the largest is named alone: for reading only
LEAST_COEFFICIENT, SINGLE = 0.05, 0.99
PER_DECADE = 4  # points on a line: with fewer a narrow mass between them would be left out of its share
# distances on a line, in reaches of the draws: widths of any size are seen, and what is improper is so far out
LINE = torch.logspace(-6, 12, 18 * PER_DECADE + 1, dtype=torch.float64)
FAR = 10 ** (1 - 0.5 / PER_DECADE)  # reaches, from where they are far out: half-way between two points near ten


def slow_rays(target: Target) -> list[tuple[str, float]]:
    """Half-axes along which log p falls no faster than 1/distance, as far out as it is finite, and its slope there.

    slope = d log p / d log t at x = offset ± t eᵢ, between the last two of t = 10, 100, ..., 10¹² with finite log p,
    worst first. A ray only names a direction: along one of them a proper density can rise too.
    """
    dim = target.dim
    like = {"dtype": torch.float64, "device": target.device}
    origin = OFFSET * torch.randn(dim, **like)
    steps = torch.cat([torch.eye(dim, **like), -torch.eye(dim, **like)])
    names = target.coordinate_names()
    slopes = _slopes(target, origin, steps, torch.tensor(DISTANCES, **like))
    rays = [(f"{'+' if i < dim else '−'}{names[i % dim]}", slope) for i, slope in slopes]
    return sorted(rays, key=lambda pair: -pair[1])


def _slopes(
    target: Target, origin: Tensor, steps: Tensor, distances: Tensor, high: float = -math.inf
) -> list[tuple[int, float]]:
    """Which of the rays origin + t · step, steps (K, dim), fall no faster than 1/t, and their last slopes.

    high: the highest log p known elsewhere.
    """
    points = origin + distances[:, None, None] * steps
    log_p = in_blocks(lambda rows: as_computed(target, rows), points.reshape(-1, points.shape[-1])).reshape(
        points.shape[:-1]
    )
    seen = log_p[log_p < torch.inf].nan_to_num(-torch.inf)
    floor = max(float(seen.max()), high) - WITHIN if len(seen) else 0.0
    slopes = [(i, _last_slope(values, floor)) for i, values in enumerate(log_p.unbind(1))]
    return [(i, slope) for i, slope in slopes if slope is not None and slope > SLOPE - SLACK]


def slow_combinations(target: Target, draws: Weights, modes: Gaussians | None) -> list[tuple[str, float]]:
    """As :func:`slow_rays`, along combinations of the coordinates, by weighted draws of a proposal and its modes.

    Directions in which the score ∇log p vanishes at all draws, as a symmetry, or a sum that data do not tell apart,
    makes it; where none of these is slow, the first that is of those from the centre to the heaviest and to the
    furthest draws and modes, where the mass of separated data runs away to, and of the widest ones of the draws.
    """
    x, names, high = draws.x, target.coordinate_names(), float(draws.log_p.max())
    centre, size = x.median(0).values, _size(x)
    null = _null_directions(target, x, size)
    best = x[draws.log_p.argmax()]
    if len(null):  # draws may lie so far out there that sums with them are rounded
        best = best - null.mT @ (torch.linalg.pinv(null.mT) @ best)
    slow = _slow(target, best, null, best.abs().amax().clamp_min(1.0).expand(len(null)), high)
    if not slow:
        steps = _outward(draws, modes, centre, size)
        steps = torch.cat([steps, _principal(x, size)]) if target.dim <= MOST_DIMS else steps
        steps = steps[steps.isfinite().all(-1) & (steps != 0).any(-1)]
        steps = steps / torch.linalg.vector_norm(steps, dim=-1, keepdim=True)
        slow = _slow(target, centre, steps, ((x - centre) @ steps.mT).abs().amax(0), high)[:1]
    return [(combination(step, names), slope) for step, slope in slow]


def _slow(target: Target, origin: Tensor, steps: Tensor, reach: Tensor, high: float) -> list[tuple[Tensor, float]]:
    """Those of unit steps (K, dim), or their negatives, along which log p falls slowly out to many times their reach
    (K,), and the slopes."""
    if not len(steps):
        return []
    rays = torch.cat([steps, -steps])
    slopes = dict(_slopes(target, origin, rays * reach.repeat(2)[:, None], COMBINED.to(rays), high))
    return [(rays[i], slope) for i, slope in slopes.items() if i < len(steps) or i - len(steps) not in slopes]


def _size(x: Tensor) -> Tensor:
    """Half the width of the middle 68 % of each column: a spread that single far draws do not set."""
    rows = x[:MIDDLE].sort(0).values
    return ((rows[int(0.84 * len(rows))] - rows[int(0.16 * len(rows))]) / 2).clamp_min(1e-300)


def _null_directions(target: Target, x: Tensor, size: Tensor) -> Tensor:
    """Directions (K, dim) along which log p does not change at any draw: of those, the ones nearest to an axis."""
    dim = x.shape[1]
    if dim > MOST_DIMS:
        return x.new_zeros(0, dim)
    rows = x[torch.linspace(0, len(x) - 1, 2 * dim + 50).long()]
    score = value_and_grad(target, rows)[1] * size
    score = score / torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp_min(1e-300)
    _, singular, vectors = torch.linalg.svd(score, full_matrices=False)
    null = vectors[singular < NULL * singular[0]]
    directions = []
    while len(null) > len(directions) and len(directions) < FURTHEST:
        onto = null.mT @ null - sum((torch.outer(v, v) for v in directions), 0.0 * torch.eye(dim).to(x))
        nearest = onto[:, _by_size(onto.diagonal())[0]]
        directions.append(nearest / torch.linalg.vector_norm(nearest))
    directions = torch.stack(directions) * size if directions else x.new_zeros(0, dim)
    return directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)


def _outward(draws: Weights, modes: Gaussians | None, centre: Tensor, size: Tensor) -> Tensor:
    """From the centre to the draws that weigh most, to the furthest that are likely, to the furthest modes, and from 0
    to the centre."""
    likely = draws.x[draws.log_p > draws.log_p.max() - HIGH]
    heavy = draws.x[draws.log_w.topk(FURTHEST).indices]
    furthest = [
        points[((points - centre) / size).square().sum(-1).topk(min(FURTHEST, len(points))).indices]
        for points in (likely, *([] if modes is None else [modes.loc]))
    ]
    return torch.cat([torch.cat([heavy, *furthest]) - centre, centre[None]])


def _principal(x: Tensor, size: Tensor) -> Tensor:
    """The widest directions of x (N, dim), in units of ``size`` and as it is."""
    x = x[:: max(len(x) // MIDDLE, 1)]
    offset = x - x.mean(0)
    widest = [
        torch.linalg.eigh((offset / unit).mT @ (offset / unit))[1][:, -PRINCIPAL:].mT * unit
        for unit in (size, torch.ones_like(size))
    ]
    return torch.cat(widest)


def _by_size(step: Tensor) -> list[int]:
    """Indices of the entries of step by falling size, equal ones, but for rounding, in their order."""
    return step.abs().mul(1e6).round().argsort(descending=True, stable=True).tolist()


def combination(step: Tensor, names: list[str]) -> str:
    """step (dim,), of length 1, in words, its largest coefficients first: "0.71 alpha − 0.71 beta", "beta"."""
    order = _by_size(step)
    if abs(step[order[0]]) > SINGLE:
        return names[order[0]]
    leading = [i for i in order if abs(step[i]) > LEAST_COEFFICIENT * abs(step[order[0]])]
    terms = [f"{'−' if step[i] < 0 else '+'} {abs(float(step[i])):.2f} {names[i]}" for i in leading[:COEFFICIENTS]]
    first = terms[0].removeprefix("+ ").replace("− ", "−", 1)
    return " ".join([first, *terms[1:], *(["+ ..."] if len(leading) > COEFFICIENTS else [])])


def far_shares(target: Target, x: Tensor, directions: Tensor) -> Tensor:
    """The share of ∫p(x + t d) dt that lies beyond |t| = FAR, averaged over rows x (J, dim), for directions (K, dim).

    Given draws x of p, its mean over x is the mass of p that lies further out than that along d, whatever p: the mean
    of a conditional probability. An improper p has it all out there. As t is logarithmic, lines of any width are seen;
    where log p is not finite they end.
    """
    t = torch.cat([-LINE, LINE]).to(x)
    shares = []
    for direction in directions:
        points = (x[:, None] + t[:, None] * direction).reshape(-1, x.shape[1])
        log_p = in_blocks(target.log_prob, points).reshape(len(x), len(t))
        log_p = torch.where(log_p.isfinite(), log_p, -torch.inf) + t.abs().log()
        share = (log_p[:, t.abs() > FAR].logsumexp(1) - log_p.logsumexp(1)).exp()
        shares.append(share.nan_to_num(0.0).mean())
    return torch.stack(shares)


def _last_slope(values: Tensor, floor: float) -> float | None:
    """The slope between the last two distances before log p ceases to be finite; None where it falls below floor."""
    bad = (~values.isfinite()).nonzero()[:, 0]
    end = int(bad[0]) if len(bad) else len(values)
    if end < 2 or values[end - 1] < floor or (len(bad) and values[end] == -torch.inf):
        return None
    return float(values[end - 1] - values[end - 2]) / math.log(10.0)


def improper(target: Target, draws: Weights | None = None, modes: Gaussians | None = None) -> str:
    """A sentence that names the directions in which the target looks improper, or "": along the coordinates, then,
    given weighted draws of a proposal that failed and its modes, along combinations of them."""
    rays, remedy = slow_rays(target), "give that parameter a proper prior"
    if not rays and draws is not None:
        rays, remedy = slow_combinations(target, draws, modes), "give these parameters proper priors, or hold one fixed"
    if not rays:
        return ""
    shown = ", ".join(name for name, _ in rays[:NAMED_RAYS]) + (", ..." if len(rays) > NAMED_RAYS else "")
    how = "keeps rising" if rays[0][1] > RISING else "falls no faster than 1/distance"
    return f"log p {how} along {shown}: the target looks improper there; {remedy}"
