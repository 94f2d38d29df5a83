"""Flow, a module, and FlowDistribution, the Pyro distribution that a flow gives for a context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from .bases import Base
from .bijection import Bijection, BijectionTransform, Compose, Layer, initialise, pulled_back


class NotConverged(RuntimeError):
    """A numerical inverse has not reached its tolerance."""


class FlowDistribution(TorchDistribution):
    """The law of x = f(z), z ~ base: log q(x) = log q₀(f⁻¹(x)) + log|det df⁻¹/dx|.

    Event shape (dim,); the batch shape is the context's. Built by :class:`Flow` for one context and thrown away (after
    an optimizer step build another): it remembers the (x, log q) of its last reparametrised draw, so that scoring that
    very tensor costs nothing.

    Raises
    ------
    ValueError for a value of another size or a wider dtype than the flow's; NotConverged if a numerical inverse fails
    at a finite value.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Base, bijection: Bijection, batch_shape: Sequence[int] = ()):
        self.base, self.bijection = base, bijection
        self._drawn: tuple[Tensor, int, Tensor] | None = None
        super().__init__(Size(batch_shape), Size((base.dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> FlowDistribution:
        """The same law over a larger batch shape: parameters broadcast, draws are independent."""
        try:
            fits = torch.broadcast_shapes(self.batch_shape, tuple(batch_shape)) == Size(batch_shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"batch_shape: {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}")
        return FlowDistribution(self.base, self.bijection, Size(batch_shape))

    def from_noise(self, noise: Tensor, path: bool = False) -> tuple[Tensor, Tensor]:
        """The draw x (\\*shape, dim) that base noise makes, and its log q (\\*shape): a pure function of the noise.

        path: the gradient of log q is that in x alone, its parameters held; the value is the same.
        """
        z = self.base.transform(noise)
        if path and torch.is_grad_enabled():
            return self._path(z)
        x, logdet = self.bijection.forward_and_logdet(z)
        return x, self.base.log_prob(z) - logdet

    def _path(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x = f(z), and log q(x) as a function of x alone: its value, and its gradient (the score) as a linear term."""
        z = z.expand(torch.broadcast_shapes(z.shape, self.batch_shape + self.event_shape))
        held = z.detach().requires_grad_()
        log_base = self.base.log_prob(held)
        (score,) = pulled_back((log_base,), (torch.ones_like(log_base),), held)
        x, logdet, score = self.bijection.forward_and_score(z if z.requires_grad else held, score)
        return x, (log_base - logdet).detach() + (score * (x - x.detach())).sum(-1)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Reparametrised draws (\\*sample_shape, \\*batch_shape, dim) and their log q, in one pass."""
        return self.from_noise(self.base.noise(Size(sample_shape) + self.batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        x, log_q = self.rsample_and_log_prob(sample_shape)
        if torch.is_grad_enabled():  # a pair drawn without a graph must not stand in for one with it
            self._drawn = (x, x._version, log_q)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """log q of any value (..., dim), whether drawn here or not.

        Second derivatives are right where the inverse is in closed form (not for planar and Sylvester flows).
        """
        if self._drawn is not None and self._drawn[0] is value and self._drawn[1] == value._version:
            return self._drawn[2]
        value = self._broadcast(value)
        z, logdet = self.bijection.inverse_and_logdet(value)
        log_q = self.base.log_prob(z) + logdet
        self._check_converged(value, log_q)
        return log_q

    def _broadcast(self, value: Tensor) -> Tensor:
        """value over the batch shape, or an error that says why it does not fit."""
        if value.dim() == 0 or value.shape[-1] != self.base.dim:
            raise ValueError(f"value: expected shape (..., {self.base.dim}), got {tuple(value.shape)}")
        _check_precision("value", value, self.base.anchor.dtype)
        try:
            return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        except RuntimeError:
            given = f"batch shape {tuple(value.shape[:-1])} does not broadcast with the context's"
            raise ValueError(f"value: its {given}, {tuple(self.batch_shape)}; insert axes of size 1") from None

    def as_transform(self) -> BijectionTransform:
        """The ``torch.distributions`` transform from base z to sample x."""
        return BijectionTransform(self.bijection)

    @staticmethod
    def _check_converged(value: Tensor, log_q: Tensor) -> None:
        try:
            failed = int((log_q.isnan() & value.isfinite().all(-1)).sum())
        except RuntimeError:  # inside vmap or a capture no value can be read: NaN stays to tell
            return
        if failed:
            raise NotConverged(
                f"log_prob: the inverse did not converge at {failed} of {log_q.numel()} finite values; "
                "use float64, or a flow with less extreme parameters"
            )


def _check_precision(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse what the flow's parameters would round: the result would look more precise than it is."""
    if torch.promote_types(tensor.dtype, dtype) != dtype:
        raise ValueError(f"{name}: expected {dtype}, as the flow's, got {tensor.dtype}; convert the flow by .double()")


class Flow(nn.Module):
    """A base distribution and a stack of layers; ``flow(context)`` is a :class:`FlowDistribution`.

    Parameters
    ----------
    layers: applied in order from base z to sample x.
    base: the law of z; its ``dim`` is the flow's.
    context: size of the context that the layers were built for, or None.

    Raises
    ------
    ValueError if a context is missing, superfluous, or of another size.
    """

    def __init__(self, layers: Sequence[Layer], base: Base, context: int | None = None):
        super().__init__()
        self.layers, self.base, self.context = nn.ModuleList(layers), base, context

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.base.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.base.anchor.device

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        context = self._checked(context)
        bijection = Compose([layer(context) for layer in self.layers])
        return FlowDistribution(self.base, bijection, Size() if context is None else context.shape[:-1])

    def _checked(self, context: Tensor | None) -> Tensor | None:
        if (context is None) != (self.context is None) or (
            context is not None and (context.dim() == 0 or context.shape[-1] != self.context)
        ):
            expected = "None" if self.context is None else f"a tensor of shape (..., {self.context})"
            got = "None" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"context: expected {expected}, got {got}; the recipe's context= says what a flow takes")
        if context is None:
            return None
        _check_precision("context", context, self.dtype)
        return context.to(self.dtype)

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Let the layers whose start hangs on data look at it once, each in its own coordinates; most do not look.

        Parameters
        ----------
        x: rows (N, dim). context: theirs, (N, context_dim), or None.

        Raises
        ------
        ValueError for rows of another size or a wider dtype than the flow's, for values that are not finite, and for
        a context as at a call.
        """
        if x.dim() != 2 or x.shape[1] != self.dim or len(x) == 0 or not x.isfinite().all():
            got = f"shape {tuple(x.shape)} with {int((~x.isfinite()).sum())} values that are not finite"
            raise ValueError(
                f"x: expected finite rows of shape (N, {self.dim}), got {got}; leave out or mend these rows"
            )
        _check_precision("x", x, self.dtype)
        initialise(self.layers, x.to(self.dtype), self._checked(context))

    def then(self, *layers: Layer) -> Flow:
        """A copy of this flow with more layers on the sample side."""
        copied = copy.deepcopy(self)
        return Flow([*copied.layers, *layers], copied.base, self.context)


def exact(flow: Flow) -> Flow:
    """The flow itself, in its ``eval()`` mode, where its log-determinants are exact: what may be judged by weights.

    Raises ValueError naming the layer that estimates its own even so: noise in log q would bias every weight.
    """
    context = None if flow.context is None else torch.zeros(flow.context, dtype=flow.dtype, device=flow.device)
    for i, layer in enumerate(flow.eval().layers):
        if not layer(context).exact:
            got = f"estimates from layer {i}, {type(layer).__name__}"
            raise ValueError(
                f"flow: expected exact log-determinants in judging, got {got}; replace it by an exact layer"
            )
    return flow
