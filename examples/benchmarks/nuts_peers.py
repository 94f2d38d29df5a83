"""The chains that nuts.py times, behind one interface: made (which compiles), warmed up, then run by pieces.

All are single chains of NUTS at the packages' own settings, in float64, from their own starting points. A Pyro model of
a suite is run as it is; the others, NumPyro, BlackJAX and nutpie, need its models again, in JAX: :func:`numpyro_models`
has a few of them.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc import NUTS

Values = dict[str, np.ndarray]
PIECE = 100  # steps: chains in JAX run so many as one XLA program


class Chain:
    """One chain; made: ready for its first step."""

    warmup: int  # steps

    def warm_up(self) -> None:
        self.run(self.warmup)

    def run(self, steps: int) -> Any:
        """The next unconstrained states (steps, ...)."""
        raise NotImplementedError

    def values(self, pieces: list[Any]) -> Values:
        """The sites of what several runs gave, in the model's own terms, (n, ...) each."""
        raise NotImplementedError

    def close(self) -> None:
        """End what runs beside the chain: nothing, of most."""


class PyroChain(Chain):
    """NUTS of Pyro, its potential compiled by torch.jit; made: traced, and a first step size sought."""

    warmup = 300  # its own 1,000 would cost minutes

    def __init__(self, model: Callable, data: Any, seed: int):
        pyro.set_rng_seed(seed)
        self.kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
        self.kernel.setup(self.warmup, data)
        self.state = self.kernel.initial_params

    def run(self, steps: int) -> dict[str, torch.Tensor]:
        states = []
        for _ in range(steps):
            self.state = self.kernel.sample(self.state)
            states.append(self.state)
        return {name: torch.stack([state[name] for state in states]) for name in self.state}

    def values(self, pieces: list[dict[str, torch.Tensor]]) -> Values:
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in self.state}
        return {name: self.kernel.transforms[name].inv(value).numpy() for name, value in joined.items()}


class JaxChain(Chain):
    """A chain on a model of NumPyro: made by :meth:`compile`, ``PIECE`` steps of it are one XLA program.

    ``program`` maps a state to the state after so many steps and the unconstrained sites at each of them;
    ``postprocess`` maps such sites to the model's terms.
    """

    warmup = 1000  # they cost next to nothing
    state: Any
    program: Callable
    postprocess: Callable

    def __init__(self, model: Callable, data: Any, seed: int):
        import jax

        jax.clear_caches()  # what the chain before compiled would make this one's compilation look short
        self.jax = jax
        self.compile(model, {name: jax.numpy.asarray(value.numpy()) for name, value in data.items()}, seed)

    def run(self, steps: int) -> Any:
        """The next unconstrained states (steps, ...); ``steps`` is a multiple of ``PIECE``."""
        pieces = []
        for _ in range(steps // PIECE):
            self.state, states = self.program(self.state)
            pieces.append(states)
        return self.jax.block_until_ready(self._joined(pieces))

    def values(self, pieces: list[Any]) -> Values:
        constrained = self.jax.vmap(self.postprocess)(self._joined(pieces))
        return {name: np.asarray(value) for name, value in constrained.items()}

    def _joined(self, pieces: list[Any]) -> Any:
        return self.jax.tree.map(lambda *parts: self.jax.numpy.concatenate(parts), *pieces)

    def _potential(self, model: Callable, arrays: dict[str, Any], key: Any) -> tuple[Any, Callable]:
        """A random starting point of NumPyro's, and log p of unconstrained sites."""
        from numpyro.infer.util import initialize_model

        found = initialize_model(key, model, model_args=(arrays,))
        self.postprocess = found.postprocess_fn
        return found.param_info.z, lambda sites: -found.potential_fn(sites)


class NumPyroChain(JaxChain):
    """NUTS of NumPyro."""

    def compile(self, model: Callable, arrays: dict[str, Any], seed: int) -> None:
        from numpyro.infer import NUTS as Kernel

        jax, kernel = self.jax, Kernel(model)
        self.state = kernel.init(jax.random.key(seed), self.warmup, None, (arrays,), {})
        self.postprocess = kernel.postprocess_fn((arrays,), {})

        def step(state: Any, _: None) -> tuple[Any, Any]:
            after = kernel.sample(state, (arrays,), {})
            return after, after.z

        steps = jax.jit(lambda state: jax.lax.scan(step, state, None, length=PIECE))
        self.program = steps.lower(self.state).compile()


class BlackJAXChain(JaxChain):
    """NUTS of BlackJAX, after its window adaptation, which is one XLA program as well."""

    def compile(self, model: Callable, arrays: dict[str, Any], seed: int) -> None:
        import blackjax

        jax = self.jax
        key, initial, warming = jax.random.split(jax.random.key(seed), 3)
        start, log_p = self._potential(model, arrays, initial)
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_p)
        kernel = blackjax.nuts.build_kernel()

        def adapt(start: Any, key: Any, warming: Any) -> tuple[Any, Any, Any]:
            (state, settings), _ = adaptation.run(warming, start, self.warmup)
            return state, key, {name: settings[name] for name in ("step_size", "inverse_mass_matrix")}

        def step(carried: tuple[Any, Any, Any], _: None) -> tuple[Any, Any]:
            state, key, settings = carried
            key, now = jax.random.split(key)
            after, _ = kernel(now, state, log_p, **settings)
            return (after, key, settings), after.position

        lowered = jax.jit(adapt).lower(start, key, warming)
        steps = jax.jit(lambda carried: jax.lax.scan(step, carried, None, length=PIECE))
        self.state, self.adapt = (start, key, warming), lowered.compile()
        self.program = steps.lower(jax.eval_shape(adapt, *self.state)).compile()

    def warm_up(self) -> None:
        self.state = self.jax.block_until_ready(self.adapt(*self.state))


class NutpieChain(JaxChain):
    """NUTS of nutpie, on a gradient that XLA compiles; its thread waits while nobody asks for its draws."""

    warmup = 400  # its own

    def compile(self, model: Callable, arrays: dict[str, Any], seed: int) -> None:
        from jax.flatten_util import ravel_pytree
        from nutpie.compiled_pyfunc import from_pyfunc

        jax = self.jax
        start, log_p = self._potential(model, arrays, jax.random.key(seed))
        flat, unravel = ravel_pytree(start)
        found, self.seed, self.open, self.sampler = self.postprocess, seed, True, None
        self.postprocess = lambda x: found(unravel(x))
        program = jax.jit(jax.value_and_grad(lambda x: log_p(unravel(x)))).lower(flat).compile()
        self.drawn: queue.Queue[np.ndarray] = queue.Queue(maxsize=1)

        def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = program(x)
            return float(value), np.asarray(gradient)

        def pass_on(x: np.ndarray) -> dict[str, np.ndarray]:
            if self.open:
                self.drawn.put(x.copy())
            return {"x": x}

        names = [np.dtype(float)], [flat.shape], ["x"]
        self.model = from_pyfunc(flat.size, lambda: value_and_gradient, lambda *_: pass_on, *names)

    def warm_up(self) -> None:
        import nutpie

        settings = {"chains": 1, "cores": 1, "seed": self.seed, "tune": self.warmup, "draws": 10**6}
        self.sampler = nutpie.sample(self.model, **settings, progress_bar=False, blocking=False)
        self.run(self.warmup)

    def run(self, steps: int) -> np.ndarray:
        """The next unconstrained states (steps, D); raises queue.Empty where nutpie has given up."""
        return np.stack([self.drawn.get(timeout=60) for _ in range(steps)])

    def close(self) -> None:
        """Let nutpie's thread end, which waits for its draws to be taken."""
        self.open = False
        with contextlib.suppress(queue.Empty):
            self.drawn.get_nowait()
        if self.sampler is not None:
            self.sampler.cancel()


PEERS = {"NumPyro": NumPyroChain, "BlackJAX": BlackJAXChain, "nutpie": NutpieChain}


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
