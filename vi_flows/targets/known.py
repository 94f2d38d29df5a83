"""A density of which the answers are known: log ∫p, exact draws, modes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .density import LogDensity

Box = tuple[tuple[float, float], tuple[float, float]]
CELLS = 900  # of a grid on the plane, along each axis


class KnownDensity(LogDensity):
    """The target log p(x) = fn(x), with what is known of p beforehand.

    Parameters
    ----------
    fn, dim: as of :class:`LogDensity`.
    log_z, log_z_se, how: log ∫p and its standard error (0 if exact), None if unknown; how it is known, in words.
    draw: (n, generator) -> exact draws (n, dim), if there is a way.
    mode_of: x (N, dim) -> which of the ``modes`` modes each row belongs to (N,).
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        dim: int,
        *,
        log_z: float | None = None,
        log_z_se: float = 0.0,
        how: str = "",
        draw: Callable[[int, Generator], Tensor] | None = None,
        modes: int = 1,
        mode_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(fn, dim)
        self.log_z, self.log_z_se, self.how = log_z, log_z_se, how
        self.draw, self.modes, self.mode_of = draw, modes, mode_of

    def draws(self, n: int, seed: int = 0) -> Tensor:
        """n independent draws of p (n, dim), float64, which depend on ``seed`` alone.

        Raises ValueError where no way to draw is known.
        """
        if self.draw is None:
            raise ValueError("draws: expected a density that can be drawn from exactly, got one that cannot; vf.fit it")
        return self.draw(n, Generator().manual_seed(seed))

    def mode_shares(self, x: Tensor) -> Tensor:
        """The share of the rows of x (N, dim) in each mode (modes,)."""
        index = self.mode_of(x) if self.mode_of is not None else torch.zeros(len(x), dtype=torch.long)
        return torch.bincount(index, minlength=self.modes) / len(x)


def grid_draws(log_p: Callable[[Tensor], Tensor], box: Box, n: int, generator: Generator) -> Tensor:
    """n draws from a density on the plane: of a cell of a fine grid, then uniform in it."""
    sides = [(high - low) / CELLS for low, high in box]
    middles = torch.arange(CELLS, dtype=torch.float64) + 0.5
    centres = torch.cartesian_prod(*(low + side * middles for (low, _), side in zip(box, sides, strict=True)))
    cell = cells(torch.cat([log_p(rows) for rows in centres.split(10_000)]), n, generator)
    jitter = torch.stack([uniform(n, generator), uniform(n, generator)], -1) - 0.5
    return centres[cell] + jitter * jitter.new_tensor(sides)


def cells(log_p: Tensor, n: int, generator: Generator) -> Tensor:
    """n indices (n,) drawn with probabilities in proportion to exp(log_p)."""
    total = log_p.softmax(0).cumsum(0)
    return torch.searchsorted(total[:-1].contiguous(), uniform(n, generator))


def normal(n: int, dim: int, generator: Generator) -> Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=generator)


def uniform(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator)
