"""The benchmark of collapse: its densities against quadrature, what it calls a result, and the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.fixture
def collapse(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import collapse

    return collapse


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(BENCHMARKS / "collapse.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_two_normals_by_quadrature(collapse, share):
    """∫p = 1, and the mass right of 0 is the mode's share; along the second axis p is a unit normal."""
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    p = collapse.two_normals(1, 6.0, share).log_prob(x[:, None]).exp()
    assert torch.trapezoid(p, x) == pytest.approx(1, abs=1e-9)
    assert torch.trapezoid(p[2000:], x[2000:]) == pytest.approx(share, abs=1e-7)
    flat = torch.stack([x, torch.full_like(x, 1.5)], 1)
    ratio = collapse.two_normals(2, 6.0, share).log_prob(flat) - p.log()
    assert torch.allclose(ratio, torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(1.5, dtype=ratio.dtype)))


def test_results(collapse):
    row = {"share": 0.9, "weighted": 0.91, "log_z_error": 0.05, "status": "corrected"}
    assert collapse.result(row) == "recovered"
    assert collapse.result({**row, "weighted": 1.0}) == "FALSE CLAIM"
    assert collapse.result({**row, "log_z_error": -0.105}) == "FALSE CLAIM"
    assert collapse.result({**row, "weighted": 1.0, "status": "unreliable"}) == "unreliable"
    assert collapse.result({**row, "status": "unreliable"}) == "unreliable, though right"


def test_targets(collapse):
    """24 fits of two normals with two seeds, and 20 targets of one mode."""
    assert len(collapse.PAIRS) == 12 and len(collapse.unimodal()) == 20


def test_program(tmp_path):
    """Both tables; rows of the file are kept."""
    out = tmp_path / "rows.json"
    done = run("--only", "D=1 ±6 0.9,normal 2", "--seeds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    pair, alone = json.loads(out.read_text(encoding="utf-8"))
    assert pair["result"] == "recovered" and abs(pair["own"] - 0.9) < 0.05 and pair["ess"] > 0.5
    assert alone["name"] == "normal 2" and not alone["wrong"] and not alone["unclaimed"]
    assert "1 recovered" in done.stdout and "0 false alarms" in done.stdout
    out.write_text(json.dumps([{**pair, "result": "FALSE CLAIM"}, alone]), encoding="utf-8")
    again = run("--only", "D=1 ±6 0.9", "--seeds", "1", "--json", str(out))
    assert "1 FALSE CLAIM" in again.stdout and len(json.loads(out.read_text(encoding="utf-8"))) == 2


def test_unknown_name():
    done = run("--only", "three")
    assert done.returncode == 2 and "--only" in done.stderr and "Traceback" not in done.stderr
