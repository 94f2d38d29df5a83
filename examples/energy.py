"""Draws from an energy, and its log normaliser: a banana-shaped valley in two dimensions.

Run it:             python examples/energy.py
From the shell:     vi-flows sample examples/energy.py:energy --dim 2 --energy
"""

import math

import torch

import vi_flows as vf


def energy(x: torch.Tensor) -> torch.Tensor:
    """Minus the log density, up to a constant: (N, 2) -> (N,)."""
    along, across = x[:, 0] / 2, x[:, 1] - x[:, 0] ** 2 / 4
    return 0.5 * along**2 + 0.5 * (across / 0.5) ** 2


# x0 ~ N(0, 2), and x1 given x0 ~ N(x0²/4, 0.5): so Z = 2π · 2 · 0.5
LOG_Z = math.log(2 * math.pi)

if __name__ == "__main__":
    posterior = vf.fit(vf.Energy(energy, dim=2))

    draws = posterior.sample(4000, seed=1)  # a tensor (4000, 2)
    print(f"means {draws.mean(0).tolist()}  (0 and 1)")
    print(f"sds   {draws.std(0).tolist()}  (2 and 1.5)")

    error = posterior.log_evidence - LOG_Z
    print(
        f"log Z {posterior.log_evidence:.4f} ± {posterior.log_evidence_se:.4f}, known {LOG_Z:.4f}, error {error:+.4f}"
    )
    print(posterior.describe())
