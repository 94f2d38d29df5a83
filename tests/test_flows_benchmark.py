"""The benchmark of flows beside peers, as a program: it runs with the peers that are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "flows.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120)


def test_flows_benchmark(tmp_path):
    """Every operation of every contestant that has it, by round; the rest with its reason."""
    out = tmp_path / "rows.json"
    families = ["--only", "planar", "--only", "maf"]
    done = run(*families, "--dims", "3", "--batches", "8", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = {(row["family"], row["operation"]): row["ms"] for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {
        *(("planar", operation) for operation in ("step", "draw", "log_prob", "svi")),
        *(("maf", operation) for operation in ("step", "draw", "log_prob")),
    }
    assert all({"ours", "recipe"} <= set(times) for times in rows.values())
    assert all(len(rounds) == 2 and min(rounds) > 0 for times in rows.values() for rounds in times.values())
    assert "pyro" in rows["planar", "step"] and "pyro" in rows["planar", "svi"] and "pyro" in rows["maf", "log_prob"]
    assert "pyro" not in rows["planar", "log_prob"] and "pyro, planar log_prob: KeyError" in done.stdout
    assert "zuko" not in rows["planar", "step"] and "zuko, planar: " in done.stdout


def test_float64():
    done = run("--only", "iaf", "--dims", "2", "--batches", "4", "--rounds", "1", "--dtype", "float64")
    assert done.returncode == 0, done.stderr
    for operation in ("step", "draw", "log_prob", "svi"):
        assert re.search(rf"^{operation} +2 +4 .*\d\.\d\dx \w+ \(", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--only", "glow"], ["--dims", "two"]])
def test_wrong_arguments(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr and "Traceback" not in done.stderr
