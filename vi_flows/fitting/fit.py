"""fit: from a model or a density to a judged posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..inference.candidates import fitted, prepare
from ..inference.options import Options
from ..inference.rehearse.rehearse import check_rehearsal
from ..inference.start import FlowChoice
from ..progress import Progress
from ..running import seeded
from ..running import threads as torch_threads
from ..targets import resolve_target
from ..targets.resolve import check_keywords
from .posterior import Posterior


def fit(
    target_or_model: Any,
    *args: Any,
    flow: FlowChoice = "auto",
    seed: int = 0,
    progress: bool = True,
    steps: int = 1500,
    particles: int = 256,
    lr: float = 1e-2,
    max_seconds: float | None = None,
    num_draws: int = 10_000,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    init: Any = None,
    threads: int | None = 1,
    capture: bool | str = "auto",
    compile: bool = False,
    correct: bool = True,
    reparam: bool | Mapping[str, Any] = True,
    rehearse: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Fit a flow to a Pyro model or an unnormalised density by reverse KL, and judge it by importance weights.

    Locates the mass (Pathfinder, Laplace, Gaussian VI), trains the flow on top of the Gaussian, or the mixture of them,
    that is found, never returns worse than that, and judges the result through a defensive proposal.

    Parameters
    ----------
    target_or_model: a Pyro model (``args`` and ``kwargs`` are its arguments; where it has an argument of the name of an
        option here, give it a ``PyroModel(model, ...)``), or a target: ``LogDensity``, ``Energy``, ``PyroModel``.
    flow: "auto", the name of a recipe, a callable dim -> Flow, or a Flow (copied); see ``vf.recipes``.
    seed: the result depends on it alone; torch's global generators are left as found.
    progress: show a progress bar.
    steps: at most so many training steps (1500). particles: draws in each (256). lr: of Adam (0.01).
    max_seconds: wall time, about, for all stages: locating ends by two fifths of it, training when judging needs the
        rest. Where locating or judging is cut short no claim is made. None: no limit, and the result depends on the
        seed alone, but for annealing, which is left out where it would take longer than locating and training did (or
        15 s), as a note then says. Above 50 dimensions training that leads nowhere is given up, without annealing.
    num_draws: draws kept, and in each of the five repeats of k̂ (10,000).
    dtype: of the target's evaluation: float64 unless it can only do float32; flow and weights are float64 always.
    device: where flow and target work.
    init: a Posterior, a Flow or an AutoFlow guide, whose flow is trained on; or values to start near: a dict of named
        values of a model, or a tensor (dim,) or (n, dim) of unconstrained points.
    threads: of torch during the fit. 1 unless asked: on a few hundred rows a second thread costs more than it does.
        None leaves torch's setting.
    capture: "auto" runs training steps and a Pyro model's evaluations, once they have come up often enough to pay, as
        the tensor operations recorded from one of them: the same numbers, without running the Python again. False
        never does; True does from the first model evaluation on, and notes why where it cannot.
    compile: compile the training step to machine code, for long trainings: two to ten times faster, after a minute or
        so (not counted in ``max_seconds``). Where that fails a warning and a note say why, and training goes on.
    correct: where importance weights are unreliable although all modes are seen, anneal (:meth:`Posterior.anneal`), and
        return that if it can be claimed. False leaves the verdict at what the weights say.
    reparam: True centres, or does not, each site of a model whose location or scale is latent, as the ELBO says (see
        :func:`vi_flows.inference.locate.centring.centred`): values keep their names and scale, and a note says what
        was chosen. False leaves the model as written; degrees of centring by site ({"theta": 0.0}) settle them.
    rehearse: so many data sets are drawn from the fit and refitted (:meth:`Posterior.rehearse`), at some seconds each.

    Raises
    ------
    TypeError for an unknown option; ValueError, in one line, for a target that cannot be fitted; DivergedError.
    """
    given = dict(locals())
    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    check_keywords(fit, target_or_model, kwargs, given)
    with seeded(seed), torch_threads(threads), Progress(progress) as bar:
        target = prepare(resolve_target(target_or_model, *args, **kwargs), options)
        if rehearse:
            check_rehearsal(target, rehearse)
        posterior = Posterior(**vars(fitted(target, flow, options, seed, bar)))
        if rehearse:
            bar.stage("rehearsing", rehearse)
            posterior.rehearse(rehearse, seed, report=lambda row: bar.advance())
    return posterior
