"""Centring: coordinates in which a hierarchy's sites do, or do not, move with the location and scale they come from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .pyro_run import base_of

if TYPE_CHECKING:
    from .pyro_sites import Site

# families on R with loc and scale; on (0, ∞) with a scale, by the attribute that holds it and its sign in the logarithm
LOCATED = ("Normal", "StudentT", "Laplace", "Cauchy", "Logistic", "SoftLaplace", "Gumbel", "LogNormal")
SCALE_FAMILIES = {
    "HalfNormal": ("scale", 1),
    "HalfCauchy": ("scale", 1),
    "Weibull": ("scale", 1),
    "InverseGamma": ("rate", 1),
    "Gamma": ("rate", -1),
    "Exponential": ("rate", -1),
}
MATRIX = ("MultivariateNormal", "MultivariateStudentT")
SCALE_FLOOR = 1e-300  # a scale that underflows to 0 would make 0 · ∞ of coordinates that are sound


@dataclass(frozen=True, eq=False)
class Frame:
    r"""Location m and scale s of a site's distribution: its unconstrained value is u = m + s z, with noise z.

    Its coordinate at the degree c of centring is x = c m + s^c z: z itself at c = 0 (non-centred), u at c = 1 (centred;
    Papaspiliopoulos, Roberts & Sköld 2007). Through z nothing cancels, however small the scale.

    loc, scale: broadcast to u; scale None is 1. tril: lower-triangular matrices in place of the scale, which act on the
    last axis of u; c is then 0 or 1.
    """

    loc: Tensor
    scale: Tensor | None = None
    tril: Tensor | None = None

    def value(self, z: Tensor) -> Tensor:
        """u = m + s z."""
        return self.coordinate(z, torch.ones((), dtype=z.dtype, device=z.device))

    def noise(self, x: Tensor, degree: Tensor) -> Tensor:
        """z = s^{−c} (x − c m); at c = 1, of the value u."""
        if self.tril is not None:
            if not bool(degree.any()):
                return x
            return torch.linalg.solve_triangular(self.tril, (x - self.loc).unsqueeze(-1), upper=False).squeeze(-1)
        offset = x - degree * self.loc
        return offset if self.scale is None else offset * self._scale() ** -degree

    def coordinate(self, z: Tensor, degree: Tensor) -> Tensor:
        """x = c m + s^c z."""
        if self.tril is not None:
            return self.loc + (self.tril @ z.unsqueeze(-1)).squeeze(-1) if bool(degree.any()) else z
        offset = degree * self.loc
        return offset + z if self.scale is None else offset + self._scale() ** degree * z

    def log_det(self, z: Tensor, degree: Tensor) -> Tensor:
        """log|dz/dx| = −c log s, entry by entry, in the shape of z."""
        if self.tril is not None:
            return (-degree * self.tril.diagonal(dim1=-2, dim2=-1).log()).expand_as(z)
        return torch.zeros_like(z) if self.scale is None else (-degree * self._scale().log()).expand_as(z)

    def log_scale(self) -> Tensor:
        """The logarithm of the scale of values: log s, or of a matrix's diagonal, or, on (0, ∞), the location."""
        if self.tril is not None:
            return self.tril.diagonal(dim1=-2, dim2=-1).log()
        return self.loc if self.scale is None else self._scale().log()

    def _scale(self) -> Tensor:
        return self.scale.clamp_min(SCALE_FLOOR)

    def same(self, other: Frame) -> bool:
        """Whether two frames are equal, as those of two runs are where a site depends on no other."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("loc", "scale", "tril")]
        return all(a is b or (a.shape == b.shape and bool((a == b).all())) for a, b in pairs)


def frame_of(fn: Any) -> Frame | None:
    """The frame of a distribution, or None where it has none that is known: families by name, whatever wraps them."""
    fn = base_of(fn)
    name = type(fn).__name__
    if name in LOCATED:
        return Frame(torch.as_tensor(fn.loc), torch.as_tensor(fn.scale))
    if name in SCALE_FAMILIES:
        attribute, sign = SCALE_FAMILIES[name]
        return Frame(sign * torch.as_tensor(getattr(fn, attribute)).log())
    if name == "FoldedDistribution" and type(fn.base_dist).__name__ in LOCATED:
        return Frame(torch.as_tensor(fn.base_dist.scale).log())
    if name in MATRIX:
        return Frame(fn.loc, tril=fn.scale_tril)
    return None


def standard_of(fn: Any) -> Any:
    """The law of the noise z of a distribution with a location: the same family with location 0 and scale 1."""
    base = base_of(fn)
    name, loc = type(base).__name__, base.loc
    if name in MATRIX:
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        zero = torch.zeros_like(loc)
        law = dist.MultivariateNormal(zero, scale_tril=eye)
        law = dist.MultivariateStudentT(base.df, zero, eye) if name == "MultivariateStudentT" else law
    else:
        law = copy.copy(base.base_dist if name == "LogNormal" else base)
        law.loc, law.scale = torch.zeros_like(law.loc), torch.ones_like(law.scale)
    inside = fn.event_dim - law.event_dim
    return law.expand(fn.batch_shape + fn.event_shape[:inside]).to_event(inside)


def centrable(site: Mapping[str, Any], others: list[Mapping[str, Any]]) -> bool:
    """Whether a latent site's frame is known and differs between runs, so that it depends on other latent sites."""
    if isinstance(site["mask"], Tensor) or site["mask"] is False:  # imputed in part, or a flat prior
        return False
    if isinstance(site["scale"], Tensor) or site["scale"] != 1:  # a power of a density does not go with its frame
        return False
    frames = [frame_of(node["fn"]) for node in (site, *others)]
    return None not in frames and not all(frames[0].same(frame) for frame in frames[1:])


def degrees_of(site: Site, degree: Tensor | float, is_matrix: bool, dtype: torch.dtype) -> Tensor:
    """A degree of centring in the shape of a site's unconstrained value. Raises ValueError for what is none."""
    shape = site.unconstrained_shape
    expected = (
        f"reparam['{site.name}']: expected degrees of centring in [0, 1], one or of shape {tuple(shape)}, "
        f"got {degree!r}"
    )
    try:
        value = torch.as_tensor(degree, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(expected) from error
    if (value.dim() and value.shape != shape) or not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(expected)
    if is_matrix and not bool((value == 0).all() | (value == 1).all()):
        raise ValueError(f"reparam['{site.name}']: expected 0 or 1, for its scale is a matrix, got {degree!r}")
    return value.expand(shape).clone()


@dataclass(frozen=True, eq=False)
class Centring:
    """Which sites have coordinates of their own, and at which degrees (in the shape of the unconstrained value)."""

    sites: Mapping[str, Site]
    degrees: Mapping[str, Tensor]

    def given(self, coordinates: Mapping[str, Tensor]) -> Recentred:
        """The handler for a run at these coordinates."""
        return Recentred(self, coordinates)

    def coordinates(self, nodes: Mapping[str, Any]) -> dict[str, Tensor]:
        """x of these sites at the values that they have in a trace's nodes."""
        one, found = torch.ones(()), {}
        for name, site in self.sites.items():
            frame = frame_of(nodes[name]["fn"])
            z = frame.noise(site.transform.inv(nodes[name]["value"]), one)
            found[name] = frame.coordinate(z, self.degrees[name])
        return found


class Recentred(Messenger):
    """Gives sites of a run the values of their coordinates, in the frames that the run itself arrives at.

    coordinates: x by name, shaped as unconstrained values, in a particle plate with the particles before. The trace
    around it sees the noise of a located site under its standard law, so that no density of a value near its location
    is asked for. After the run: ``log_det``, what the densities in the trace lack of that of x, in several tensors;
    values and frames by name.
    """

    def __init__(self, centring: Centring, coordinates: Mapping[str, Tensor]):
        super().__init__()
        self.centring, self.given = centring, coordinates
        self.log_det: list[Tensor] = []
        self.values: dict[str, Tensor] = {}
        self.noise: dict[str, tuple[Frame, Tensor]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        site = self.centring.sites.get(msg["name"])
        if site is None:
            return
        frame, degree = frame_of(msg["fn"]), self.centring.degrees[site.name]
        z = frame.noise(self.given[site.name], degree)
        u = frame.value(z)
        value = u if site.is_identity else site.transform(u)
        self.values[site.name], self.noise[site.name] = value, (frame, z)
        msg["value"], msg["is_observed"] = value, True
        if frame.scale is None and frame.tril is None:
            self.log_det.append(site.transform.log_abs_det_jacobian(u, value))
        else:
            msg["value"], msg["fn"] = z, standard_of(msg["fn"])
            self.log_det.append(frame.log_det(z, degree))

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
