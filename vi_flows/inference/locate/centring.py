"""Which sites of a hierarchy are centred, and how far: chosen by the ELBO of the Gaussian that fits each choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...targets import PyroModel, Target
from ..estimate.weights import mean_elbo
from .ascent import bfgs_paths
from .gaussian import Gaussians, Kind, from_covariance, gaussian_vi, join
from .large import locate_large
from .locate import pathfinder
from .points import DENSE_DIMS, start_points

# that say how wide a standard value is before there are data, to about 5 %: degrees of centring need no more
PRIOR_DRAWS = 400
# of Gaussian VI in each choice of coordinates: with fewer, choices are compared before they settle
CENTRING_ITERATIONS = 40
CENTRING_DRAWS = 1000  # that compare the choices: ELBOs are then certain to about .1 nats
NAMED_SITES = 4  # in one sentence, the others are counted: for reading only


def centred(
    target: Target, reparam: bool | Mapping[str, Any], device: torch.device | str | None
) -> tuple[Target, Tensor | None, str]:
    """The target in coordinates of the user's choice: as written, at given degrees, or by :func:`choose_centring`."""
    if not isinstance(reparam, (bool, Mapping)):
        raise ValueError(f"reparam: expected True, False or degrees of centring by site, got {reparam!r}")
    if isinstance(reparam, bool):
        return choose_centring(target, device) if reparam else (target, None, "")
    if not isinstance(target, PyroModel):
        raise ValueError("reparam: expected True or False for a density, got degrees by site; pass a Pyro model")
    return target.recentred(reparam), None, ""


def choose_centring(target: Target, device: torch.device | str | None) -> tuple[Target, Tensor | None, str]:
    """The target in the coordinates whose Gaussian has the best ELBO; where that lies (1, dim); a sentence about it.

    For models with sites whose location or scale is latent (``centrable``): all non-centred, each entry centred in part
    (:func:`learned`), or as written. A target without such sites is returned as it is, with None and "".
    """
    if not isinstance(target, PyroModel) or not target.centrable:
        return target, None, ""
    apart = target.recentred({name: 0.0 for name in target.centrable})
    first = first_gaussian(apart, start_points(apart, device=device))
    partly = target.recentred(learned(apart, first))
    if target.dim > DENSE_DIMS:  # there a Gaussian VI of each choice would take minutes
        return partly, apart.translate(first.loc, partly), _sentence(partly)
    found, elbos = {}, {}
    epsilon = torch.randn(CENTRING_DRAWS, target.dim).to(first.loc)
    for choice in (partly, apart, target):
        start = carried(first, apart, choice)
        found[choice] = gaussian_vi(choice, start, CENTRING_ITERATIONS) if len(start) else start
        elbos[choice] = float(found[choice].elbo(choice, epsilon)[0]) if len(start) else -torch.inf
    best = max(elbos, key=elbos.get)
    gain = f"; its Gaussian has an ELBO {elbos[best] - elbos[target]:.1f} nats above that of the model as written"
    return best, found[best].loc, _sentence(best) + (gain if best is not target else "")


def first_gaussian(target: Target, starts: Tensor) -> Gaussians:
    """One Gaussian of a high ELBO: Pathfinder and a short Gaussian VI, without optima and further starts."""
    dim = starts.shape[1]
    if dim > DENSE_DIMS:
        found, _ = locate_large(target, starts)
    else:
        found = pathfinder(target, bfgs_paths(target, starts)[1], keep=3)
        if not len(found):
            raise ValueError("log_prob: expected finite values near some start, got none; pass init= where p > 0")
        found = join([found, gaussian_vi(target, found, CENTRING_ITERATIONS)])
    log_w = found.log_weights(target, torch.randn(CENTRING_DRAWS, dim).to(starts))
    elbos = [mean_elbo(column) for column in log_w.unbind(1)]
    return found.pick([elbos.index(max(elbos))])


def learned(apart: PyroModel, gaussian: Gaussians) -> dict[str, Tensor]:
    r"""Degrees of centring c by site, from a Gaussian over non-centred coordinates: the share that the data have in
    what is known of an entry, given all else,

    .. math:: c_j = 1 - v_j^{-1} / (\Sigma^{-1})_{jj},

    with v the prior variance of the coordinate. For normal data of precision I under a scale τ it is Iτ²/(1 + Iτ²),
    which makes entry and hyperparameters independent (Papaspiliopoulos, Roberts & Sköld 2007). Under a matrix it is
    rounded.
    """
    inverse = torch.linalg.solve_triangular(gaussian.scale_tril[0], torch.eye(apart.dim).to(gaussian.loc), upper=False)
    precision = inverse.square().sum(0)
    drawn = apart.prior(PRIOR_DRAWS).to(gaussian.loc)
    low, high = drawn.quantile(torch.tensor([0.25, 0.75]).to(drawn), 0)
    prior = ((high - low) / 1.349).square()  # of a normal, and of what has no variance
    degrees = {}
    for site in apart.sites:
        if site.name not in apart.degrees:
            continue
        share = 1 - 1 / (prior[site.slice].median() * precision[site.slice])
        share = share.clamp(0.0, 1.0).reshape(site.unconstrained_shape)
        degrees[site.name] = share.mean().round() if apart.is_matrix(site.name) else share
    return degrees


def carried(gaussian: Gaussians, here: PyroModel, there: PyroModel) -> Gaussians:
    """The Gaussian with the moments that draws of one have in other coordinates; none where that has no covariance."""
    x = gaussian.at(torch.randn(max(CENTRING_DRAWS, 8 * here.dim), here.dim).to(gaussian.loc))[:, 0]
    y = here.translate(x, there)
    y = y[y.isfinite().all(-1)]
    return from_covariance(y.mean(0)[None], torch.cov(y.mT)[None], Kind.DRAWS)[0]


def _sentence(target: PyroModel) -> str:
    """What was chosen, in words."""
    if not target.degrees:
        return "centring: every site as written"
    words = []
    for name, degree in target.degrees.items():
        low, high = float(degree.min()), float(degree.max())
        words.append(f"{name} {low:.2f}" if high - low < 0.01 else f"{name} {low:.2f} to {high:.2f}")
    shown = ", ".join(words[:NAMED_SITES]) + (
        f" and {len(words) - NAMED_SITES} more" if len(words) > NAMED_SITES else ""
    )
    return f"centring: degrees {shown} (1: as written, 0: non-centred)"
