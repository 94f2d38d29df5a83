"""The chains that nuts.py times, Pyro's and NumPyro's, behind one interface: made (which compiles), then run by pieces.

Both are single chains of NUTS at the packages' own settings, in float64, from their own starting points. A Pyro model
of a suite is run as it is; NumPyro needs its models again, which :func:`numpyro_models` has for a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc import NUTS

Values = dict[str, np.ndarray]


class PyroChain:
    """NUTS of Pyro, its potential compiled by torch.jit; made: traced, and a first step size sought."""

    def __init__(self, model: Callable, data: Any, warmup: int, seed: int):
        pyro.set_rng_seed(seed)
        self.kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
        self.kernel.setup(warmup, data)
        self.state = self.kernel.initial_params

    def run(self, steps: int) -> dict[str, torch.Tensor]:
        """The next unconstrained states (steps, ...), the warm-up's first."""
        states = []
        for _ in range(steps):
            self.state = self.kernel.sample(self.state)
            states.append(self.state)
        return {name: torch.stack([state[name] for state in states]) for name in self.state}

    def values(self, pieces: list[dict[str, torch.Tensor]]) -> Values:
        """The sites of what several runs gave, in the model's own terms, (n, ...) each."""
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in self.state}
        return {name: self.kernel.transforms[name].inv(value).numpy() for name, value in joined.items()}


class NumPyroChain:
    """NUTS of NumPyro, ``piece`` steps of which are one XLA program; made: initialised and compiled."""

    def __init__(self, model: Callable, data: Any, warmup: int, seed: int, piece: int):
        import jax
        from numpyro.infer import NUTS as Kernel

        self.jax, self.piece = jax, piece
        arrays = ({name: jax.numpy.asarray(value.numpy()) for name, value in data.items()},)
        self.kernel, self.arrays = Kernel(model), arrays
        self.state = self.kernel.init(jax.random.key(seed), warmup, None, arrays, {})

        def step(state: Any, _: None) -> tuple[Any, Any]:
            after = self.kernel.sample(state, arrays, {})
            return after, after.z

        steps = jax.jit(lambda state: jax.lax.scan(step, state, None, length=piece))
        self.program = steps.lower(self.state).compile()

    def run(self, steps: int) -> dict[str, Any]:
        """The next unconstrained states (steps, ...), the warm-up's first; ``steps`` is a multiple of ``piece``."""
        pieces = []
        for _ in range(steps // self.piece):
            self.state, states = self.program(self.state)
            pieces.append(states)
        return self.jax.block_until_ready(self._joined(pieces))

    def values(self, pieces: list[dict[str, Any]]) -> Values:
        """The sites of what several runs gave, in the model's own terms, (n, ...) each."""
        constrained = self.jax.vmap(self.kernel.postprocess_fn(self.arrays, {}))(self._joined(pieces))
        return {name: np.asarray(value) for name, value in constrained.items()}

    def _joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: self.jax.numpy.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def numpyro_models() -> dict[str, Callable]:
    """The models that are written for NumPyro, by the short names of the suite's; float64 from here on.

    Raises ImportError where NumPyro is not installed.
    """
    import numpyro
    import numpyro.distributions as dist
    from jax import lax, numpy

    numpyro.enable_x64()

    def eight_schools_noncentered(data: dict) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        z = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        numpyro.sample("y", dist.Normal(mu + tau * z, data["sigma"]), obs=data["y"])

    def regression(data: dict, sigma_prior: Any) -> None:
        flat = dist.Normal(0.0, 1.0).expand([data["X"].shape[1]]).to_event(1).mask(False)
        beta, sigma = numpyro.sample("beta", flat), numpyro.sample("sigma", sigma_prior)
        numpyro.sample("y", dist.Normal(data["X"] @ beta, sigma), obs=data["y"])

    def arma11(data: dict) -> None:
        y = data["y"]
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
        theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
        past = numpy.concatenate([mu[None], y[:-1]])

        def error(before: Any, at: Any) -> tuple[Any, Any]:
            now = at[0] - mu - phi * at[1] - theta * before
            return now, now

        _, errors = lax.scan(error, numpy.zeros(()), (y, past))
        numpyro.factor("lik", dist.Normal(0.0, sigma).log_prob(errors).sum())

    return {
        "eight_schools_noncentered": eight_schools_noncentered,
        "kidscore_interaction": lambda data: regression(data, dist.HalfCauchy(2.5)),
        "nes": lambda data: regression(data, dist.HalfNormal(1.0).mask(False)),
        "arma11": arma11,
    }
