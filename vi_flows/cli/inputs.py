"""What the command line is given: functions from Python files, data from JSON files, arguments for models."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vi_flows as vf

from ..errors import first_line

LISTED_NAMES = 8  # names shown of those that a file defines


@contextlib.contextmanager
def loaded(where: str) -> Iterator[Callable[..., Any]]:
    """The function that FILE.py:NAME names; inside the block its folder is on sys.path, since models import siblings.

    Raises ValueError, in one line, for another form, a missing file, one that does not load, or no such function.
    """
    file, colon, name = where.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"target: expected FILE.py:NAME, got {where!r}; such as model.py:model")
    if not path.is_file():
        raise ValueError(f"target: expected a Python file, got {file}, which does not exist; check the path")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield _function(_load_module(path), name, path)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _load_module(path: Path) -> ModuleType:
    name = f"vi_flows_input_{path.stem}"  # a name of its own: a file called torch.py hides nothing
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(
            f"target: expected {path} to load, got {first_line(error)}{_line_in(path, error)}; "
            "run it with python to see more"
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """', at line 12' if the error passed through the file; a SyntaxError says so itself."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    return f", at line {lines[-1]}" if lines else ""


def _function(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found) and not isinstance(found, type):
        return found
    if found is not None:
        raise ValueError(f"target: expected {name} in {path} to be a function, got {type(found).__name__}")
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    listed = ", ".join([n for n in own if not n.startswith("_")][:LISTED_NAMES]) or "no function"
    raise ValueError(f"target: expected a function {name!r} in {path}, got none of that name; it defines {listed}")


@contextlib.contextmanager
def to_density(where: str, dim: int | None, energy: bool, data: Path | None) -> Iterator[vf.Target]:
    """The target that FILE.py:FUNCTION or the NAME of a known density names; use it inside the block, as of `loaded`.

    Raises ValueError, in one line, for options that do not go with it, besides what `loaded` raises.
    """
    if ":" not in where and not where.endswith(".py"):
        yield _known_density(where, dim, energy, data)
        return
    if data is not None:
        raise ValueError(f"--data: expected none beside FILE.py:FUNCTION, got {data}; read it in the file itself")
    if dim is None:
        raise ValueError("--dim: expected the number of coordinates of FILE.py:FUNCTION, got none; add --dim D")
    with loaded(where) as function:
        yield (vf.Energy if energy else vf.LogDensity)(function, dim)


def _known_density(name: str, dim: int | None, energy: bool, data: Path | None) -> vf.Target:
    known = vf.catalogue.names()
    if name not in known:
        raise ValueError(f"target: expected FILE.py:FUNCTION or one of {', '.join(known)}, got {name!r}")
    if energy:
        raise ValueError(f"--energy: expected FILE.py:FUNCTION beside it, got {name}, a log density; leave it out")
    target = vf.catalogue.get(name, data)
    if dim not in (None, target.dim):
        raise ValueError(f"--dim: expected {target.dim} for {name}, got {dim}; leave it out")
    return target


def known_densities() -> str:
    """The names of the known densities with a line on each, and which of them need data."""
    width = max(map(len, vf.catalogue.names()))
    lines = [
        f"{name:<{width}}  {vf.catalogue.summary(name)}{'; needs --data DIR' if vf.catalogue.needs_data(name) else ''}"
        for name in vf.catalogue.names()
    ]
    return "\n".join(lines)


def read_data(path: Path | None) -> dict[str, Any]:
    """The entries of a JSON object, lists of numbers as tensors; {} without a path.

    Lists become float64 tensors, or int64 or bool ones where all their entries are; lists of strings and single values
    stay as they are; objects are read in the same way. Raises ValueError, in one line, for anything else.
    """
    if path is None:
        return {}
    if not path.is_file():
        raise ValueError(f"--data: expected a JSON file, got {path}, which does not exist; check the path")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--data: expected JSON in {path}, got {error}") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ValueError(f'--data: expected a JSON object in {path}, got a {kind}; write {{"y": [...]}}')
    return {name: _value(entry, name) for name, entry in data.items()}


def _value(entry: Any, name: str) -> Any:
    if isinstance(entry, dict):
        return {key: _value(item, f"{name}.{key}") for key, item in entry.items()}
    return _tensor(entry, name) if isinstance(entry, list) else entry


def _tensor(entry: list[Any], name: str) -> Tensor | list[Any]:
    try:
        array = np.asarray(entry)
    except ValueError:
        raise ValueError(
            f"--data: expected {name} to be rectangular, got lists of different lengths; pad them"
        ) from None
    if array.dtype.kind == "U":
        return entry
    if array.dtype.kind not in "bif":
        raise ValueError(
            f"--data: expected numbers in {name}, got null, objects or too large an integer; leave them out"
        )
    return torch.from_numpy(array)


def to_model(model: Callable[..., Any], data: dict[str, Any]) -> vf.PyroModel:
    """The model with the data's entries as its arguments of the same names.

    A model of one argument whose name is no key takes all the data as one dict. Raises ValueError, in one line, for
    arguments that are missing and data that no argument takes.
    """
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(named) == 1 and not takes_any and data and named[0].name not in data:
        return vf.PyroModel(model, data)
    names = [p.name for p in named]
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    if missing:
        raise ValueError(
            f"--data: expected a value for the model's argument {missing[0]!r}, got {_listed(data)}; "
            "add it to the JSON object (a density instead of a model: vi-flows sample)"
        )
    unknown = [name for name in data if name not in names]
    if unknown and not takes_any:
        raise ValueError(f"--data: expected only the model's arguments ({', '.join(names)}), got {unknown[0]!r} too")
    positional = [data.pop(p.name) for p in named if p.kind is p.POSITIONAL_ONLY and p.name in data]
    return vf.PyroModel(model, *positional, **data)


def _listed(data: dict[str, Any]) -> str:
    return f"only {', '.join(data)}" if data else "no data"
