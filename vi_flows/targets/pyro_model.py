"""A Pyro model as a target: its joint log density over R^D, and x as named values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import first_line
from .capture import CALLS_BEFORE_RECORDING, Captured
from .pyro_centring import Centring, Frame, degrees_of
from .pyro_modes import choose_mode
from .pyro_run import NUMERICAL, ModelRun, Values, by_halves, seeded_in_use
from .pyro_sites import Site, account, inspect_model, plate_dims
from .target import Target
from .values import believed

MODEL_BLOCK = 4096


class PyroModel(Target):
    r"""The joint density of a Pyro model's latent sites and its data, over unconstrained x.

    .. math:: \log p(x) = \log p(T(x), \text{data}) + \log|\det dT/dx|, \quad T = \text{biject\_to(support) per site}

    model, args, kwargs: a Pyro model and what it is called with. Float tensors in them (in dicts, lists and tuples too)
    are cast to float64, and the model runs under default dtype float64 with validation off; both are restored. A model
    that fails in float64 because of float32 tensors of its own runs in float32. pyro.param sites are constants.

    Attributes: dim; names and sites, the latent sites in the order of x; observed, the data by name; factors and
    deterministic, those sites' names; fixed, pyro.param sites and a module's parameters with their values; mode and
    mode_reason, how a batch is evaluated ("vmap", "plate" or "loop", checked against single evaluations here);
    failed_rows and last_failure, how many rows the model has raised at (a Cholesky, say): they have log p = -inf;
    nonfinite, what :func:`check_finite` does with NaN and +inf: "skip", since a model's arithmetic overflows far out;
    capture, whether batches of a size that comes up often are evaluated by the recorded tensor operations of one such
    batch (see ``capture.py``): "auto", False, or True for every batch from the first on; capture_refused, why they
    cannot be. What else the model reads counts as constant until :meth:`forget`.
    centrable, the names of latent sites whose location or scale depends on other latent sites; degrees, by name, the
    degrees of centring of those that :meth:`recentred` gave coordinates of their own.

    Raises ValueError (TypeError for missing arguments), in one line, for what cannot be a target: no latent sites,
    discrete ones, supports that depend on latent values or have no bijection, subsampling, random structure or un-named
    random numbers, data that are empty, not finite, or broadcast against their distribution.
    """

    def __init__(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._call = (model, args, kwargs)
        try:
            self._prepare(torch.float64)
        except Exception as error:
            if not _is_dtype_mismatch(error):
                raise
            self._prepare(torch.float32)

    def _prepare(self, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        model, args, kwargs = self._call
        with seeded_in_use(0):
            self._run = ModelRun(model, args, kwargs, dtype, device)
            layout = inspect_model(self._run)
            self.dtype = dtype
            self.device = None if device is None else torch.device(device)
            self.nonfinite = "skip"
            self.capture: bool | str = "auto"
            self.failed_rows = 0
            self.last_failure = ""
            self._layout = layout
            self.dim = layout.dim
            self.sites: tuple[Site, ...] = layout.sites
            self.names = [site.name for site in layout.sites]
            self.centrable = list(layout.centrable)
            self.degrees: Values = {}
            self.observed: Values = layout.observed
            self.factors = list(layout.factors)
            self.fixed: Values = self._run.fixed()
            self.deterministic = list(layout.deterministic)
            self._captured = Captured(self._evaluate)
            self.mode, self.mode_reason = "loop", ""
            choose_mode(self)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PyroModel:
        other = object.__new__(PyroModel)
        other._call = self._call
        other._prepare(dtype or self.dtype, device or self.device)
        other.nonfinite, other.capture = self.nonfinite, self.capture
        return other.recentred(self.degrees) if self.degrees else other

    def recentred(self, degrees: Mapping[str, Tensor | float]) -> PyroModel:
        r"""The same density over other coordinates x of sites whose location m and scale s depend on latent values:

        .. math:: u = m + s^{1-c} (x - c\,m), \quad \text{value} = T(u)

        with degrees c by site, numbers or tensors of the shape of the site's unconstrained value: 1 is the model as it
        is written (centred), 0 gives x the law of a standard value (non-centred; Papaspiliopoulos, Roberts & Sköld
        2007), and between them an entry follows its location and scale in part (Gorinova, Moore & Hoffman 2020). On
        (0, ∞) m is the logarithm of the scale, and s is 1; with a matrix for a scale c is 0 or 1. Sites that are not
        named stay centred. Named values, the evidence and the order of coordinates stay what they are.

        Raises ValueError for a site that is not in ``centrable`` and for degrees outside [0, 1] or of another shape.
        """
        other = copy.copy(self)
        other._run = copy.copy(self._run)
        sites = {site.name: site for site in self.sites if site.name in self._layout.centrable}
        other.degrees = {}
        for name, degree in degrees.items():
            if name not in sites:
                raise ValueError(
                    f"reparam['{name}']: expected a site whose location or scale is latent "
                    f"({', '.join(sites) or 'this model has none'}), got another"
                )
            value = degrees_of(sites[name], degree, self.is_matrix(name), self.dtype)
            other.degrees[name] = value.to(self.device)
        chosen = {name: sites[name] for name in other.degrees}
        other._run.centring = Centring(chosen, other.degrees) if chosen else None
        other._captured = Captured(other._evaluate)
        if self.mode == "vmap":
            with seeded_in_use(0):
                choose_mode(other)
        return other

    def scales(self) -> list[int]:
        """The coordinates on which scales of sites in ``centrable`` depend, those of the smallest sites first."""
        apart = self.recentred({name: 0.0 for name in self.centrable})
        with seeded_in_use(0):
            x = apart.prior(1)
        with self._run.settings(), torch.enable_grad():
            x = x.to(dtype=self.dtype, device=self.device).requires_grad_()
            row = {name: value[0] for name, value in apart._transform(x)[0].items()}
            frames = [frame for frame, _ in apart._run.noise(row).values()]
            total = sum((torch.rand_like(s) * s).sum() for s in map(Frame.log_scale, frames))
            if not total.requires_grad:  # only locations are latent
                return []
            (gradient,) = torch.autograd.grad(total, x, allow_unused=True, materialize_grads=True)
        moves = (gradient[0] != 0).tolist()
        sites = sorted(self.sites, key=lambda site: site.stop - site.start)
        return [i for site in sites for i in range(site.start, site.stop) if moves[i]]

    def is_matrix(self, name: str) -> bool:
        """Whether the scale of a site in ``centrable`` is a matrix."""
        return self._layout.centrable[name]

    @property
    def capture_refused(self) -> str:
        return self._captured.refused if self.mode == "vmap" else f"it is evaluated by {self.mode}"

    def forget(self) -> None:
        """Drop what has been recorded, as after a change in a number or tensor that the model reads."""
        self._captured.forget()

    def fresh(self, capture: bool | str) -> PyroModel:
        self.forget()
        if capture == "auto":
            return self
        other = copy.copy(self)
        other.capture = capture
        return other

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of each row of x (N, dim), as (N,) in x's dtype; -inf where it is above values.BELIEVED, and, counted,
        for rows at which the model raises."""
        return believed(self.as_computed(x))

    def as_computed(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected shape (N, {self.dim}), got {tuple(x.shape)}; pass one point per row")
        inside = x.to(dtype=self.dtype, device=self.device)
        parts = by_halves(lambda rows: self._over(rows["x"]), {"x": inside}, self._failed)
        log_p = parts[0] if len(parts) == 1 else torch.cat(parts)
        return log_p.to(dtype=x.dtype, device=x.device)

    def _over(self, x: Tensor) -> Tensor:
        """log p (N,) of the rows of x (N, dim), which may raise for all because of one."""
        if self.mode != "vmap" or self.capture is False:
            return self._evaluate(x)
        return self._captured(x, wait=0 if self.capture is True else CALLS_BEFORE_RECORDING)

    def _evaluate(self, x: Tensor) -> Tensor:
        """log p (N,) of the rows of x (N, dim) by the model itself."""
        with self._run.settings():
            values, log_det = self._transform(x)
            log_p = self._log_joint(values)
            return log_p if log_det is None else log_p + log_det

    def constrain(self, x: Tensor) -> Values:
        """Named values of x (N, dim): latent sites (N, *shape), then deterministic ones (NaN if the model raises)."""
        computed = [name for name in [*self.names, *self.deterministic] if name in self._computed()]
        with self._run.settings():
            values, _ = self._transform(x.to(dtype=self.dtype, device=self.device))
            if not computed:
                return values
            evaluate = self._each(self._run.deterministic)
            blocks = []
            for start in range(0, len(x), MODEL_BLOCK):
                block = {name: value[start : start + MODEL_BLOCK] for name, value in values.items()}
                blocks += by_halves(evaluate, block, self._failed_deterministic)
        return values | {name: torch.cat([block[name] for block in blocks]) for name in computed if blocks}

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """x (dim,) of one point's constrained values, or x (N, dim) of a batch: the inverse of :meth:`constrain`.

        values: by latent site, each of the site's shape or all with one leading dimension N; others (deterministic) are
        ignored. Raises ValueError for a missing site, a wrong shape, or a value outside its site's support.
        """
        missing = [name for name in self.names if name not in values]
        if missing:
            raise ValueError(f"values: expected one for every latent site, got none for '{missing[0]}'")
        parts, batched, whole = [], set(), {}
        for site in self.sites:
            value = torch.as_tensor(values[site.name], dtype=self.dtype, device=self.device)
            batched.add(value.dim() > len(site.shape))
            value = site.checked(value)
            parts.append(site.unconstrained(value))
            whole[site.name] = value
        if len({len(part) for part in parts}) > 1 or len(batched) > 1:
            raise ValueError(f"values: expected one leading size, got {sorted({len(part) for part in parts})}")
        x = self._with_coordinates(torch.cat(parts, -1), whole)
        return x if batched == {True} else x[0]

    def prior(self, n: int) -> Tensor:
        """x (n, dim) of draws from the prior; a flat one, .mask(False), gives draws of the distribution under the mask.

        Draws at which the model raises or x is not finite are drawn again. Uses torch's global random numbers.
        """
        rows: list[Tensor] = []
        for _ in range(10 * n + 100):
            if len(rows) == n:
                break
            try:
                nodes = self._run.prior().nodes
            except NUMERICAL:
                continue
            row = torch.cat([site.unconstrained(nodes[site.name]["value"][None]) for site in self.sites], -1)
            if self.degrees:
                row = self._placed(row, {k: v[None] for k, v in self._run.centring.coordinates(nodes).items()})
            rows += [row] if bool(row.isfinite().all()) else []
        if len(rows) < n:
            raise ValueError(f"prior: expected {n} finite draws, got {len(rows)} in {10 * n + 100} runs of the model")
        return torch.cat(rows)

    def coordinate_names(self) -> list[str]:
        """A name for each coordinate of x: 'tau', 'theta[3]', 'b[1,2]' (positions in the unconstrained value)."""
        return [name for site in self.sites for name in site.coordinate_names()]

    def plate_dims(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
        return plate_dims(self._run, shapes)

    def account(self) -> list[str]:
        return account(self.observed, self.factors, self.fixed)

    def _transform(self, x: Tensor, raw: Values | None = None) -> tuple[Values, Tensor | None]:
        """The latent values, each (N, *shape), and log|det dT/dx| (N,), None for the identity.

        Of sites with coordinates of their own (``raw``: of these) they take the place of values, for which the model
        must be run.
        """
        raw = self.degrees if raw is None else raw
        values: Values = {}
        total: Tensor | None = None
        for site in self.sites:
            if site.name in raw:
                values[site.name] = x[:, site.slice].reshape(len(x), *site.unconstrained_shape)
                continue
            values[site.name], log_det = site.constrained(x)
            if log_det is not None:
                total = log_det if total is None else total + log_det
        return values, total

    def _log_joint(self, values: Values) -> Tensor:
        if self.mode == "vmap":
            return torch.func.vmap(self._run.log_joint)(values)
        if self.mode == "plate":
            return self._log_joint_in_plate(values)
        count = len(next(iter(values.values())))
        return torch.stack([self._run.log_joint({k: v[i] for k, v in values.items()}) for i in range(count)])

    def _log_joint_in_plate(self, values: Values) -> Tensor:
        """log p (N,) with each value as (N, 1, .., *batch, *event), the particles left of the model's own plates."""
        depth, shaped = self._layout.plate_nesting, {}
        for site in self.sites:
            batch = len(site.shape) - site.event_dim
            value = values[site.name]
            shaped[site.name] = value.reshape(len(value), *(1,) * (depth - batch), *site.shape)
        return self._run.log_joint_in_plate(shaped, dim=-1 - depth)

    def _computed(self) -> dict[str, torch.Size]:
        """The sites whose values only a run of the model tells, with their shapes."""
        own = {site.name: site.shape for site in self.sites if site.name in self.degrees}
        return own | self._layout.deterministic

    def _with_coordinates(self, x: Tensor, values: Values) -> Tensor:
        """x (N, dim) with the coordinates of recentred sites at values (N, *shape) in its place."""
        if not self.degrees:
            return x
        with self._run.settings():
            return self._placed(x, self._each(self._run.coordinates)(values))

    def _each(self, fn: Callable[[Values], Any]) -> Callable[[Values], Any]:
        """fn of one point, over all rows of values."""
        return torch.func.vmap(fn) if self.mode == "vmap" else lambda values: _in_turn(fn, values)

    def translate(self, x: Tensor, other: PyroModel) -> Tensor:
        """The coordinates in ``other``, the same model at other degrees of centring, of points x (N, dim) of this."""
        return self.translate_and_logdet(x, other)[0]

    def translate_and_logdet(self, x: Tensor, other: PyroModel) -> tuple[Tensor, Tensor]:
        """x' (N, dim) of :meth:`translate`, and log|dx'/dx| (N,)."""
        names = [name for name in self.centrable if name in (self.degrees | other.degrees)]
        if not names:
            return x, x.new_zeros(len(x))
        one = {name: torch.ones((), dtype=self.dtype, device=self.device) for name in names}
        run, degrees = copy.copy(self._run), {name: other.degrees.get(name, one[name]) for name in names}
        run.centring = Centring({s.name: s for s in self.sites if s.name in one}, one | self.degrees)
        with run.settings():
            given, _ = self._transform(x.to(dtype=self.dtype, device=self.device), raw=one)
            moved, log_det = self._each(lambda row: run.translated(row, degrees))(given)
        return self._placed(x, moved), log_det.to(dtype=x.dtype, device=x.device)

    def _placed(self, x: Tensor, coordinates: Values) -> Tensor:
        parts = [coordinates.get(s.name, x[:, s.slice]).reshape(len(x), -1) for s in self.sites]
        return torch.cat(parts, -1)

    def _failed(self, values: Values, error: Exception) -> Tensor:
        """-inf for one row, with gradient 0, so that it stays in the graph of the others."""
        self.failed_rows += 1
        self.last_failure = first_line(error)
        touched = sum(value.reshape(1, -1).sum(-1) for value in values.values())
        return torch.as_tensor(touched).masked_fill(torch.ones(1, dtype=torch.bool, device=touched.device), -torch.inf)

    def _failed_deterministic(self, values: Values, error: Exception) -> Values:
        self.last_failure = first_line(error)
        like = next(iter(values.values()))
        return {name: like.new_full((1, *shape), torch.nan) for name, shape in self._computed().items()}


def _in_turn(fn: Callable[[Values], Any], values: Values) -> Any:
    """fn of each row of values, its results stacked."""
    rows = [fn({k: v[i] for k, v in values.items()}) for i in range(len(next(iter(values.values()))))]
    return tree_map(lambda *parts: torch.stack(parts), *rows)


def _is_dtype_mismatch(error: BaseException) -> bool:
    """Whether a float64 value met a float32 tensor of the model's own, in an operation that does not promote."""
    message = f"{error}"
    parts = ("same dtype", "scalar type", "Double != float", "double != float", "Float and Double")
    return any(part in message for part in parts)
