"""What a fit is asked to do: its keyword options, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import whole


@dataclass(frozen=True)
class Options:
    """What fit's keyword options say; see :func:`fit`."""

    steps: int = 1500
    particles: int = 256
    lr: float = 1e-2
    max_seconds: float | None = None
    num_draws: int = 10_000
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    init: Any = None
    threads: int | None = 1
    capture: bool | str = "auto"
    compile: bool = False
    correct: bool = True
    reparam: bool | Mapping[str, Any] = True
    rehearse: int = 0

    def __post_init__(self):
        for name, least in (("steps", 0), ("particles", 2), ("num_draws", 100), ("threads", 1), ("rehearse", 0)):
            if name != "threads" or self.threads is not None:
                whole(name, getattr(self, name), least)
        for name in ("lr", "max_seconds"):
            value = getattr(self, name)
            if not (name == "max_seconds" and value is None) and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {self.dtype!r}")
        if not (isinstance(self.capture, bool) or self.capture == "auto"):
            raise ValueError(f'capture: expected "auto", True or False, got {self.capture!r}')
        for name in ("compile", "correct"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")

    def recorded(self) -> dict[str, Any]:
        """The options as JSON can hold them, without ``init``."""
        options = {name: value for name, value in vars(self).items() if name != "init"}
        if not isinstance(self.reparam, bool):
            options["reparam"] = {name: torch.as_tensor(degree).tolist() for name, degree in self.reparam.items()}
        return options | {name: str(options[name]) for name in ("dtype", "device") if options[name] is not None}
