"""The model of ``vi-flows demo``: eight schools, with the real data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

TITLE = """\
Eight schools (Rubin 1981): the effects of coaching on test scores, and how much
they differ between schools. mu is the mean effect, tau its spread, theta the
effects of the eight schools."""

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def model(y: Tensor, sigma: Tensor) -> None:
    """The hierarchical normal model, non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """y, sigma: the estimated effects of the schools and their standard errors."""
    return torch.tensor(EFFECTS, dtype=torch.float64), torch.tensor(ERRORS, dtype=torch.float64)
