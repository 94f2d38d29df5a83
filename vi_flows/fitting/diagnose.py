"""diagnose: judge an approximation that was made elsewhere, such as a Pyro guide trained by SVI."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..inference.candidates import Candidate, judged, prepare
from ..inference.judge.fitted import Settings
from ..inference.locate.locate import locate
from ..inference.locate.points import start_points
from ..inference.options import Options
from ..inference.scoring import as_flow
from ..inference.start import Start, Starts
from ..progress import Progress
from ..running import Clock, seeded
from ..running import threads as torch_threads
from ..targets import resolve_target
from ..targets.resolve import check_keywords
from ..targets.target import is_model
from .posterior import Posterior

OWN_STARTS = 16  # draws of q among the points from which modes are searched


def diagnose(
    guide: Any,
    target_or_model: Any,
    *args: Any,
    seed: int = 0,
    progress: bool = True,
    num_draws: int = 10_000,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = 1,
    **kwargs: Any,
) -> Posterior:
    """Judge any approximation q of a model or density: by fit's rule, with a result like fit's.

    Searches the modes of p from points of its own, so that a collapsed q is seen to miss them, and weighs draws of the
    defensive proposal around q and these modes.

    Parameters
    ----------
    guide: a Pyro guide (called, as the model is, with ``args`` and ``kwargs``), a Flow, or a Posterior.
    target_or_model: a Pyro model, or a target. seed, progress, num_draws, dtype, device, threads: as in
        :func:`vi_flows.fit`; dtype is the model's, the guide keeps its own.

    Raises
    ------
    TypeError for another kind of q; ValueError, in one line, for a model that cannot be a target, or a guide that
    cannot be scored: point estimates, and flows that know log q of their own draws only (Pyro's planar, say).
    """
    own = {"seed": seed, "progress": progress, "num_draws": num_draws, "dtype": dtype, "device": device}
    check_keywords(diagnose, target_or_model, kwargs, {**own, "threads": threads})
    options = Options(num_draws=num_draws, dtype=dtype, device=device, threads=threads)
    clock = Clock(None)
    with seeded(seed), torch_threads(threads), Progress(progress) as bar:
        target = prepare(resolve_target(target_or_model, *args, **kwargs), options)
        flow = as_flow(guide, target, *args, **kwargs).to(device).requires_grad_(False)
        bar.stage("locating")
        with torch.no_grad():
            own = flow().rsample((OWN_STARTS,))
        located = locate(target, start_points(target, own, device=device))
        clock.lap("locating")
        bar.stage("judging")
        name = getattr(guide, "flow_description", "") or f"{type(guide).__name__}, as given"
        start = Start(flow, name, recipe=None)
        found = Starts((start,), located.modes, located.probes)
        settings = Settings(seed=seed, is_model=is_model(target), options=options.recorded())
        candidate = Candidate(flow, start, math.nan, math.nan, ())
        return Posterior(**vars(judged(candidate, target, found, options, settings, clock)))
