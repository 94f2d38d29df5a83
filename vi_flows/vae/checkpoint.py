"""A VAE's training as files: the last two states and the best, each whole or not at all, and how to go on from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..errors import first_line
from .model import VAE, Architecture, build
from .training import State, VAEOptions, begin

CHECKPOINT_FORMAT = 2
LAST_FILE, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
NAMES = (LAST_FILE, PREVIOUS, BEST)
PLAIN = ("epoch", "step", "totals", "seconds", "bad", "history")  # of a state, as JSON


@dataclass(frozen=True)
class TrainingRun:
    """What a checkpoint says of its run: the architecture, the options, and what the data was."""

    architecture: Architecture
    options: VAEOptions
    data: dict[str, Any]


def save(state: State, run: TrainingRun, folder: Path) -> Path:
    """Write ``last``, which makes the one before it ``previous``; ``best`` too if the validation bound is the best."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in _tensors(state).items()}
    header = {
        "format": CHECKPOINT_FORMAT,
        "architecture": run.architecture.as_dict(),
        "options": run.options.as_dict(),
        "data": run.data,
        **{name: getattr(state, name) for name in PLAIN},
    }
    header["digest"] = _digest(header, tensors)
    last = folder / LAST_FILE
    if last.exists():
        _copy(last, folder / PREVIOUS)
    with replacing(last) as temporary:
        save_file(tensors, temporary, metadata={"vi_flows_vae": json.dumps(header)})
    if state.step == 0 and state.epoch == state.best[0]:
        _copy(last, folder / BEST)
    return last


def _copy(source: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def resume(folder: Path) -> tuple[State, TrainingRun]:
    """The state of ``last``, or, where that was removed, of ``previous``, with the generators as they were."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink()
    name = LAST_FILE if (folder / LAST_FILE).exists() else PREVIOUS
    header, tensors = _read(folder / name)
    run = _run(header, folder / name)
    state = begin(build(run.architecture), run.options)
    _load(state.vae, tensors, folder / name)
    _load_optimizer(state.optimizer, tensors)
    for key in PLAIN:
        setattr(state, key, header[key])
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state, run


def clear(folder: Path) -> None:
    """Remove a run's files."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)


def load(path: Path) -> tuple[VAE, TrainingRun, list[dict[str, float]]]:
    """The VAE of a checkpoint (of a folder: the best), its run and history."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (BEST, LAST_FILE, PREVIOUS) if (path / name).exists()), path / BEST)
    header, tensors = _read(path)
    run = _run(header, path)
    with torch.random.fork_rng(devices=[]):
        vae = build(run.architecture)
    _load(vae, tensors, path)
    return vae.eval(), run, header["history"]


def _tensors(state: State) -> dict[str, Tensor]:
    tensors = {f"vae.{name}": value for name, value in state.vae.state_dict().items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in values.items()}
    if state.vae.posterior.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors | {"rng": torch.get_rng_state()}


def _load(vae: VAE, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        vae.load_state_dict({n.removeprefix("vae."): t for n, t in tensors.items() if n.startswith("vae.")})
    except RuntimeError:
        raise ValueError(f"checkpoint: expected the tensors of its architecture, got others in {path}") from None


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            kept.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that is whole and of this version."""
    if not path.exists():
        raise ValueError(f"checkpoint: expected a folder that vae train has written, got none at {path}; train first")
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("vi_flows_vae", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        reason = f"{path} ({first_line(error, kind=False)}); remove it to use the one before"
        raise ValueError(f"checkpoint: expected a whole safetensors file, got {reason}") from None
    if not isinstance(header, dict) or header.get("format") != CHECKPOINT_FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise ValueError(
            f"checkpoint: expected one of format {CHECKPOINT_FORMAT}, got format {found} in {path}; train it again"
        )
    if header.pop("digest", None) != _digest(header, tensors):
        raise ValueError(
            f"checkpoint: expected what was saved, got changed contents in {path}; remove it to use the one before"
        )
    return header, tensors


def _run(header: dict[str, Any], path: Path) -> TrainingRun:
    try:
        architecture = header["architecture"] | {"shape": tuple(header["architecture"]["shape"])}
        return TrainingRun(Architecture(**architecture), VAEOptions(**header["options"]), header["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: expected the settings of a VAE, got others in {path} ({error})") from None


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A hash of all contents, by which a changed file is told."""
    found = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
