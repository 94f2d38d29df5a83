"""A posterior as one file: tensors as safetensors, the rest as JSON in its header."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..atomic import replacing
from ..flows import recipes
from ..flows.bases import Mixture
from ..flows.distribution import Flow
from ..flows.layers.linear import LowerTriangular
from ..flows.parameters import Fixed
from ..flows.structured import rebuilt
from ..targets.target import Target
from .estimate.weights import Weights
from .judge.check import Check, Role, Verdict
from .judge.fitted import Fitted, Settings, Stored
from .locate.gaussian import Gaussians, Kind, Origin
from .rehearse.rehearse import Rehearsal

POSTERIOR_FORMAT = 2  # of files: raised where older ones can no longer be read, so that they are refused in a line
STORED = 10_000  # weighted draws kept as named values: without the target no more can be sampled
# fields of the header that may be infinite or NaN, which JSON cannot hold: they travel as text
STORED_NUMBERS = ("khat", "khat_spread", "ess", "elbo", "log_evidence", "log_evidence_se")


def save(posterior: Fitted, path: str | Path) -> Path:
    """Write to ``path``, whole or not at all."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file name, got the folder {path}; add a name such as posterior.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = _stored(posterior)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in _tensors(posterior, stored).items()}
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata={"vi_flows": json.dumps(_header(posterior, stored))}))
    return path


def read(path: str | Path, target: Target | None = None, flow: Flow | None = None) -> Fitted:
    """What :func:`save` wrote; see ``vf.load``."""
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("vi_flows", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from None
    if not header or header.get("format") != POSTERIOR_FORMAT:
        raise ValueError(f"path: expected a vi_flows posterior of format {POSTERIOR_FORMAT}, got {path}; save it again")
    dim = tensors["flow_draws"].shape[1]
    if target is not None and target.dim != dim:
        raise ValueError(f"target: expected dim {dim}, got {target.dim}; pass the target that was fitted")
    settings = Settings(**header["settings"])
    if settings.centring:
        target = target and target.recentred(settings.centring)
    part = {p: _part(tensors, p) for p in ("proposal", "modes", "flow", "stored", "observed")}
    return Fitted(
        verdict=_verdict(header["verdict"]),
        flow_draws=tensors["flow_draws"],
        log_weights=tensors["log_weights"],
        khat_interval=tuple(_number(v) for v in header["khat_interval"]),
        **{name: _number(header[name]) for name in STORED_NUMBERS},
        proposal=Weights(**part["proposal"]),
        flow=_rebuild(settings.recipe, dim, part["flow"], flow),
        target=target,
        modes=Gaussians(
            **part["modes"], origin=tuple(Origin(Kind(kind), refined) for kind, refined in header["origins"])
        )
        if part["modes"]
        else None,
        flow_description=header["flow_description"],
        notes=tuple(header["notes"]),
        trace=tensors["trace"].tolist(),
        settings=settings,
        rehearsal=Rehearsal.from_dict(header["rehearsal"]) if header.get("rehearsal") else None,
        timing=header["timing"],
        skipped=header["skipped"],
        stored=Stored(part["stored"], part["observed"], header["dims"]) if part["stored"] else None,
    )


def _tensors(posterior: Fitted, stored: Stored) -> dict[str, Tensor]:
    out = {
        "flow_draws": posterior.flow_draws,
        "log_weights": posterior.log_weights,
        "trace": torch.tensor(posterior.trace, dtype=torch.float64),
    }
    out |= {f"proposal.{name}": getattr(posterior.proposal, name) for name in ("x", "log_q", "log_p")}
    if posterior.modes is not None:
        out |= {"modes.loc": posterior.modes.loc, "modes.scale_tril": posterior.modes.scale_tril}
    if posterior.flow is not None:
        out |= {f"flow.{name}": value for name, value in posterior.flow.state_dict().items()}
    out |= {f"stored.{name}": value for name, value in stored.draws.items()}
    return out | {f"observed.{name}": value for name, value in stored.observed.items()}


def _stored(posterior: Fitted) -> Stored:
    """What the file keeps of the target."""
    target = posterior.target
    if target is None:
        return posterior.stored or Stored({})
    drawn = posterior.sample(STORED, seed=0)
    draws = drawn if isinstance(drawn, dict) else {"x": drawn}
    shapes = {name: value.shape for name, value in target.observed.items()}
    shapes |= {name: value.shape[1:] for name, value in draws.items()}
    return Stored(draws, target.observed, target.plate_dims(shapes))


def _header(posterior: Fitted, stored: Stored) -> dict[str, Any]:
    verdict = posterior.verdict
    return {
        "format": POSTERIOR_FORMAT,
        "verdict": {
            "status": verdict.status,
            "reasons": verdict.reasons,
            "checks": [{**vars(c), "statistic": _text(c.statistic)} for c in verdict.checks],
        },
        "khat_interval": [_text(v) for v in posterior.khat_interval],
        **{name: _text(getattr(posterior, name)) for name in STORED_NUMBERS},
        "origins": posterior.modes.origin if posterior.modes is not None else [],
        "flow_description": posterior.flow_description,
        "notes": posterior.notes,
        "settings": vars(posterior.settings),
        "rehearsal": posterior.rehearsal and posterior.rehearsal.to_dict(),
        "timing": posterior.timing,
        "skipped": posterior.skipped,
        "dims": stored.dims,
    }


def _text(value: float) -> float | str:
    """JSON has no infinities: they travel as text."""
    return float(value) if math.isfinite(value) else str(float(value))


def _number(value: float | str) -> float:
    return float(value)


def _verdict(header: dict[str, Any]) -> Verdict:
    checks = tuple(
        Check(**{**c, "statistic": _number(c["statistic"]), "role": Role(c["role"])}) for c in header["checks"]
    )
    return Verdict(header["status"], tuple(header["reasons"]), checks)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def _rebuild(recipe: str | None, dim: int, state: dict[str, Tensor], flow: Flow | None) -> Flow | None:
    """The fitted flow: the recipe (or the given flow) with the whitening on top, its tensors from the file."""
    if recipe == "structured" and state:
        return rebuilt(state).requires_grad_(False)
    if recipe is not None and recipe in recipes.__all__:
        base = Mixture(state["base.loc"], weights=state["base.weights"]) if "base.loc" in state else None
        flow = getattr(recipes, recipe)(dim, base=base)
    if flow is None or not state:
        return None
    if flow.dim != dim:
        raise ValueError(f"flow: expected dim {dim}, got {flow.dim}; pass one of the architecture that was fitted")
    whitening = Fixed(LowerTriangular, shift=torch.zeros(dim), scale_tril=torch.eye(dim))
    flow = flow.then(whitening).double()
    try:
        flow.load_state_dict(state)
    except RuntimeError:
        raise ValueError("flow: its parameters differ from the file's; pass one of the same architecture") from None
    return flow.requires_grad_(False)
