"""A folder of posteriors with known answers, laid out like this:

index.json           [{"name", "dim", "tier": "A" | "B" | "C", "logZ", "se"}, ...]
models/NAME.py       load(path) -> data; model(data), a Pyro model; to_reference(samples) -> {quantity: array (S,)}
data/NAME.json       what load reads
reference/NAME.npz   names of the quantities, and their mean, sd, q05, q50, q95
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rows import wanted


@dataclass(frozen=True)
class Case:
    """One posterior of a suite."""

    folder: Path
    name: str
    dim: int
    tier: str
    log_z: float
    log_z_se: float

    @property
    def short(self) -> str:
        """The model's name, without that of its data."""
        return self.name.rpartition("-")[2]

    def load(self) -> tuple[ModuleType, Any]:
        """The model's module and its data; models import helpers from their own folder."""
        models = str((self.folder / "models").resolve())
        if models not in sys.path:
            sys.path.insert(0, models)
        spec = importlib.util.spec_from_file_location("posterior_" + self.name, f"{models}/{self.name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, module.load(self.folder / "data" / f"{self.name}.json")

    def reference(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "reference" / f"{self.name}.npz") as file:
            return {key: file[key] for key in ("names", "mean", "sd", "q05", "q50", "q95")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", type=Path, required=True, metavar="DIR", help="a folder laid out as in suite.py")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name, or several: a,b")


def cases(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Case]:
    """The suite's posteriors, those that ``--only`` names; ends with one line if there are none."""
    index = arguments.suite / "index.json"
    if not index.is_file():
        parser.error(f"--suite: expected a folder with an index.json, got {arguments.suite}")
    found = [
        Case(arguments.suite, e["name"], e["dim"], e["tier"], e["logZ"], e["se"]) for e in json.loads(index.read_text())
    ]
    chosen = [case for case in found if wanted(case.name, arguments.only)]
    if not chosen:
        parser.error(f"--only: expected part of one of {', '.join(c.name for c in found)}, got {arguments.only}")
    return chosen
