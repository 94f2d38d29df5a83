"""The examples run as a reader would run them; the benchmarks run on a small suite made here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

MODEL = """\
import json
import pyro
import pyro.distributions as dist
from _common import tensor

def load(path):
    return tensor(json.loads(path.read_text())["y"])

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

def to_reference(samples):
    return {"mu": samples["mu"], "twice": 2 * samples["mu"]}
"""


def run(script: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=timeout, cwd=ROOT / "tests"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eight_schools.py"], ["theta[7]", "verdict:", "first school"]),
        (["energy.py"], ["means", "log Z", "verdict:"]),
        (["flow_vae.py", "--epochs", "2", "--posterior", "diagonal", "planar"], ["179 test images", "planar", "IWAE"]),
        (
            ["benchmarks/vae_steps.py", "--rounds", "1", "--only", "planar,iaf"],
            ["Pyro planar-4", "iaf", "times Pyro's"],
        ),
    ],
)
def test_example_runs(command, words):
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """Two posteriors of a conjugate normal mean: one with its true reference, one with a model that fails."""
    folder = tmp_path_factory.mktemp("suite")
    for name in ("models", "data", "reference"):
        (folder / name).mkdir()
    y = [0.5, 1.5, 1.0]
    mean, sd = sum(y) / 4, 0.5
    log_z = -1.5 * math.log(2 * math.pi) - math.log(2) - 0.5 * (sum(v * v for v in y) - sum(y) ** 2 / 4)
    (folder / "models" / "_common.py").write_text(
        "import torch\ndef tensor(x):\n    return torch.as_tensor(x, dtype=torch.float64)\n"
    )
    index = []
    for name in ("made-normal", "made-broken"):
        body = MODEL if name == "made-normal" else MODEL.replace('"mu", dist', "undefined, dist")
        (folder / "models" / f"{name}.py").write_text(body)
        (folder / "data" / f"{name}.json").write_text(json.dumps({"y": y}))
        moments = {"mean": mean, "sd": sd, "q05": mean - 1.64485 * sd, "q50": mean, "q95": mean + 1.64485 * sd}
        arrays = {key: np.array([value, 2 * value]) for key, value in moments.items()}
        np.savez(folder / "reference" / f"{name}.npz", names=np.array(["mu", "twice"]), **arrays)
        index.append({"name": name, "dim": 1, "tier": "A", "logZ": log_z, "se": 0.001})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_posteriordb_benchmark(suite, tmp_path):
    out = tmp_path / "rows.json"
    done = run("benchmarks/posteriordb.py", "--suite", str(suite), "--json", str(out))
    assert done.returncode == 0, done.stderr
    good, broken = json.loads(out.read_text())
    assert good["status"] == "reliable" and not good["false_claim"]
    assert abs(good["log_z_error"]) < 0.01 and abs(good["kl"]) < 0.01
    assert good["after"]["mean"] < 0.1 and max(good["after"]["probabilities"]) < 0.015
    assert set(good["misses"]) <= {"CPU s", "k̂"}  # a slow machine; k̂ of all but constant weights is noise
    assert "NameError" in broken["error"]
    assert "of 2 met; 0 false claims; 0 right but unclaimed; 1 errors" in done.stdout


def test_posteriordb_names_false_claims():
    sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
    try:
        from posteriordb import judge
    finally:
        sys.path.pop(0)
    row = {"tier": "B", "short": "made", "status": "reliable", "kl": 0.0, "khat": 0.1, "cpu_seconds": 1.0}
    right = {"mean": 0.05, "probabilities": [0.01, 0.02, 0.01]}
    assert judge({**row, "after": right}) == {"misses": [], "met": True, "false_claim": False}
    wrong = judge({**row, "after": {**right, "mean": 0.3}})
    assert wrong == {"misses": ["mean"], "met": False, "false_claim": True}
    shy = judge({**row, "status": "unreliable", "after": right})
    assert shy == {"misses": ["unclaimed"], "met": False, "false_claim": False}
    assert judge({**row, "kl": math.nan, "after": right})["misses"] == ["KL"]


def test_targets_benchmark(suite):
    done = run("benchmarks/targets.py", "--suite", str(suite), "--only", "normal")
    assert done.returncode == 0, done.stderr
    assert "normal" in done.stdout and "vmap" in done.stdout


@pytest.mark.parametrize("arguments", [["--suite", "nowhere"], []])
def test_benchmark_without_a_suite(arguments):
    done = run("benchmarks/posteriordb.py", *arguments)
    assert done.returncode == 2 and "--suite" in done.stderr and "Traceback" not in done.stderr
