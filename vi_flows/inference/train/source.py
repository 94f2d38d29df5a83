"""Where the batches of a training step come from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...flows.bases import Base

# share of a batch of noise that is stretched, by 1 + 0.75/√D, into q's tails: under q alone they are too rare to train,
# and k̂ tells: on a heavy-tailed target it fell from .80 to .38 with this
WIDENED, WIDER = 0.25, 0.75


class Source(Protocol):
    """Batches, one for each step: of noise of the base, or of rows of data.

    watched: by how many of a batch's first rows training is watched.
    """

    watched: int

    def batch(self) -> Tensor: ...


class Noise:
    """``particles`` rows of a base's noise; stretched: the last quarter goes into the tails, and does not tell.

    Right for path gradients only: the total gradient would be biased.
    """

    def __init__(self, base: Base, particles: int, stretched: bool = False):
        self.base, self.particles = base, particles
        self.watched = particles - (int(WIDENED * particles) if stretched and base.normals else 0)

    def batch(self) -> Tensor:
        noise = self.base.noise((self.particles,))
        noise[self.watched :, : self.base.normals] *= 1 + WIDER / self.base.dim**0.5
        return noise
