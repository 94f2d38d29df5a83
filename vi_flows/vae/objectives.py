"""What a VAE's training step maximises: functions of the same terms of its draws."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .model import Terms

Objective = Callable[[Terms, float], Tensor]


def elbo(terms: Terms, beta: float = 1.0) -> Tensor:
    """E_q[log p(x|z) + β (log p(z) − log q(z|x))] of each row (N,); β = 1 is the evidence lower bound."""
    return terms.annealed(beta).mean(0)


def importance_weighted(terms: Terms, beta: float = 1.0) -> Tensor:
    """log (1/K) Σ_k w_k of each row (N,) (Burda et al. 2016, eq. 8)."""
    log_w = terms.annealed(beta)
    return log_w.logsumexp(0) - math.log(len(log_w))


def doubly_reparametrised(terms: Terms, beta: float = 1.0) -> Tensor:
    """A surrogate of each row (N,) whose gradient is that of IWAE, by DReG (Tucker et al. 2019, eq. 8).

    With normalised weights w̃ and log q's parameters held, the decoder's gradient is Σ w̃_k ∂ log w_k, the encoder's
    Σ w̃_k² (∂ log w_k/∂z) ∂z/∂φ: one factor from the sum, another from a hook on z. Its value is Σ w̃_k log w_k.
    """
    log_w = terms.annealed(beta)
    w = log_w.detach().softmax(0)
    if terms.z.requires_grad:
        terms.z.register_hook(lambda gradient: w.unsqueeze(-1) * gradient)
    return (w * log_w).sum(0)


# name: the objective, and whether log q has its gradient in z alone
OBJECTIVES: dict[str, tuple[Objective, bool]] = {
    "elbo": (elbo, False),
    "stl": (elbo, True),
    "iwae": (importance_weighted, False),
    "dreg": (doubly_reparametrised, True),
}
