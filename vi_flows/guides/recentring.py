"""The last layer of a guide over coordinates of its own: from these to a model's unconstrained values as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import Tensor

from ..flows.bijection import Bijection, Layer
from ..targets import PyroModel


class Recentring(Bijection):
    """x of a model at some degrees of centring -> x of the model as written, by running it (PyroModel.translate)."""

    def __init__(self, target: PyroModel):
        self.target, self.written = target, target.recentred({})

    def forward_and_logdet(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _flat(lambda rows: self.target.translate_and_logdet(rows, self.written), z)

    def inverse_and_logdet(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _flat(lambda rows: self.written.translate_and_logdet(rows, self.target), x)


class RecentringLayer(Layer):
    """Gives the :class:`Recentring` of a target; without parameters. Pickled, it loses the model, as guides do."""

    def __init__(self, target: PyroModel):
        super().__init__()
        self.bijection: Recentring | None = Recentring(target)
        for name, degree in target.degrees.items():  # so that parameters of another guide are told from this one's
            self.register_buffer(f"degree_{name.replace('.', '_')}", degree)

    def forward(self, context: Tensor | None = None) -> Bijection:
        if self.bijection is None:
            raise ValueError(
                "guide: expected one with its model, got one unpickled; make it anew, or with reparam=False"
            )
        return self.bijection

    def __deepcopy__(self, memo: dict[int, Any]) -> RecentringLayer:
        return RecentringLayer(self.bijection.target)  # which is not changed by anyone

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bijection": None}


def _flat(fn: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """fn of rows (N, dim), over any batch (\\*batch, dim), in the dtype of x, hidden from handlers outside."""
    with poutine.block():
        moved, log_det = fn(x.reshape(-1, x.shape[-1]))
    return moved.reshape(x.shape).to(x.dtype), log_det.reshape(x.shape[:-1]).to(x.dtype)
