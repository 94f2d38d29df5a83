"""The command line: exit statuses, one-line errors, JSON, files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.cells import cell_len

import vi_flows as vf
from vi_flows.cli import main
from vi_flows.cli.inputs import read_data, to_model

SMALL = ["--steps", "50", "--num-draws", "200", "--no-progress"]
COLUMNS = ["mean", "sd", "5%", "50%", "95%", "mcse_mean", "mcse_sd", "ess", "khat"]
PNG = b"\x89PNG\r\n\x1a\n"

MODELS = """\
import pyro
import pyro.distributions as dist
from sibling import SCALE

LIMIT = 3

class Thing:
    pass

def model(y, sigma=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, SCALE))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)

def whole(data):
    model(data["y"], data["sigma"])

def prior():
    pyro.sample("mu", dist.Normal(0.0, 1.0))

def discrete():
    pyro.sample("z", dist.Bernoulli(0.5))

def energy(x):
    return 0.5 * (x**2).sum(-1)

def log_density(x):
    return -energy(x)

def column(x):
    return -energy(x)[:, None]

def raises(x):
    raise KeyError("no such thing")
"""

DATA = {
    "ok.json": '{"y": [1, 2, 3.5]}',
    "both.json": '{"y": [1.0, 2.0], "sigma": 2.0}',
    "broken.json": '{"y": [1, 2',
    "list.json": "[1, 2]",
    "other.json": '{"Y": [1.0, 2.0]}',
    "extra.json": '{"y": [1.0], "k": 1}',
    "null.json": '{"y": [1.0, null]}',
    "ragged.json": '{"y": [[1.0], [2.0, 3.0]]}',
    "nan.json": '{"y": [1.0, NaN]}',
    "scalar.json": '{"y": 1.5}',
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "sibling.py").write_text("SCALE = 5.0\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "imports.py").write_text("\nimport no_such_module_anywhere\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    for name, text in DATA.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def threads():
    """The command line owns its process and sets torch's threads; the tests' process keeps its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


BAD = [
    ("fit models.py:modle", "models.py, got none of that name; it defines"),
    ("fit nowhere.py:model", "does not exist"),
    ("fit models.py", "expected FILE.py:NAME"),
    ("fit models.py:LIMIT", "to be a function, got int"),
    ("fit models.py:Thing", "to be a function"),
    ("fit syntax.py:f", "SyntaxError"),
    ("fit imports.py:f", "no_such_module_anywhere', at line 2"),
    ("fit exits.py:f", "SystemExit: 3, at line 1"),
    ("fit models.py:model", "model's argument 'y', got no data"),
    ("fit models.py:model --data nowhere.json", "does not exist"),
    ("fit models.py:model --data broken.json", "expected JSON in broken.json"),
    ("fit models.py:model --data list.json", "expected a JSON object"),
    ("fit models.py:model --data other.json", "model's argument 'y', got only Y"),
    ("fit models.py:model --data extra.json", "only the model's arguments (y, sigma), got 'k'"),
    ("fit models.py:model --data null.json", "expected numbers in y"),
    ("fit models.py:model --data ragged.json", "expected y to be rectangular"),
    ("fit models.py:model --data nan.json", "expected finite observed data, got nan"),
    ("fit models.py:model --data scalar.json", "has no len"),
    ("fit models.py:prior --data ok.json", "got 'y'"),
    ("fit models.py:discrete", "discrete"),
    ("fit models.py:energy", "vi-flows sample"),
    ("fit models.py:prior --flow nothing", 'flow: expected "auto" or one of'),
    ("fit models.py:prior --steps -1", "steps: expected"),
    ("fit models.py:prior --steps few", "--steps"),
    ("fit models.py:prior --num-draws 1", "num_draws: expected"),
    ("fit models.py:prior --max-seconds 0", "max_seconds: expected"),
    ("fit models.py:prior --threads 0", "--threads"),
    ("fit models.py:prior -n 10", "--draws: expected"),
    ("fit models.py:prior --out models.py", "--out: expected a folder"),
    ("fit models.py:prior --plot fit.txt", "--plot: expected a file name that ends in .png"),
    ("fit models.py:prior --plot models.py/fit.png", "--plot: expected a folder"),
    ("fit models.py:prior --nothing 1", "--nothing"),
    ("sample models.py:energy --energy", "--dim"),
    ("sample models.py:energy --energy --dim 0", "dim: expected a positive int, got 0"),
    ("sample models.py:column --dim 2", ".squeeze(-1)"),
    ("sample models.py:energy --dim 2 --data .", "--data: expected none"),
    ("sample", "or one of u1, u2"),
    ("sample funel", "or one of u1, u2"),
    ("sample funnel --dim 3", "--dim: expected 10 for funnel, got 3"),
    ("sample funnel --energy", "--energy: expected FILE.py:FUNCTION"),
    ("sample funnel --data .", "data: expected none for 'funnel'"),
    ("sample credit", "data: expected a folder for 'credit', got none"),
    ("sample credit --data .", "data: expected a folder with german.data-numeric"),
    ("sample models.py:raises --dim 2", "KeyError"),
    ("nothing", "nothing"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_ends_with_one_line_and_status_2(folder, capfd, line, message):
    options = ["--no-progress"] if line != "nothing" else []
    assert main([*line.split(), *options]) == 2
    out, err = capfd.readouterr()
    errors = [text for text in err.splitlines() if "warning:" not in text]
    assert out == "" and len(errors) == 1, err
    assert message in errors[0] and errors[0].startswith("vi-flows: ")
    assert "Traceback" not in err


def test_json_is_one_object_on_stdout_without_nan(folder, capfd):
    line = ["fit", "models.py:model", "--data", "ok.json", "--seed", "3", "--json", *SMALL[:4]]
    assert main(line) == 0
    out, err = capfd.readouterr()
    result = json.loads(out, parse_constant=lambda token: pytest.fail(f"the token {token} is not JSON"))
    assert result["status"] in ("reliable", "corrected", "unreliable")
    assert {"reasons", "checks", "khat", "khat_interval", "ess", "elbo", "log_evidence", "log_evidence_se"} <= set(
        result
    )
    assert {"timing", "settings", "num_draws", "flow", "notes", "files"} <= set(result)
    assert list(result["summary"]["mu"]) == COLUMNS
    assert result["num_draws"] == 200 and result["settings"]["seed"] == 3
    assert "training" in err, "the progress bar belongs on standard error"


def test_conjugate_model_from_the_command_line(folder, capfd):
    """mu ~ N(0, 5²), y ~ N(mu, 1), y = 1, 2, 3.5: a normal posterior in closed form."""
    assert main(["fit", "models.py:model", "--data", "ok.json", "--json", "--no-progress"]) == 0
    mu = json.loads(capfd.readouterr().out)["summary"]["mu"]
    precision = 1 / 25 + 3
    assert mu["mean"] == pytest.approx(6.5 / precision, abs=5 * mu["mcse_mean"])
    assert mu["sd"] == pytest.approx(precision**-0.5, rel=0.02)


def test_out_holds_the_posterior_summary_draws_and_result(folder, capfd):
    line = ["sample", "models.py:energy", "--energy", "--dim", "2", "--out", "new/out", "-n", "123", *SMALL]
    assert main(line) == 0
    assert "written to new/out" in capfd.readouterr().out
    out = folder / "new" / "out"
    files = ["draws.npz", "posterior.png", "posterior.safetensors", "report.html", "result.json", "summary.csv"]
    assert sorted(path.name for path in out.iterdir()) == files
    with np.load(out / "draws.npz") as draws:
        assert draws["x"].shape == (123, 2)
    assert (out / "summary.csv").read_text().startswith(f"name,{','.join(COLUMNS)}\nx[0],")
    result = json.loads((out / "result.json").read_text())
    assert [Path(name).name for name in result["files"]] == [
        "posterior.safetensors",
        "summary.csv",
        "draws.npz",
        "posterior.png",
        "report.html",
        "result.json",
    ]
    assert f'<h1>Verdict: <span style="color: var(--{result["status"]})">' in (out / "report.html").read_text()
    assert vf.load(out / "posterior.safetensors").log_evidence == pytest.approx(result["log_evidence"])


def test_people_get_a_table_a_verdict_and_numbers_within_80_columns(folder, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["fit", "models.py:whole", "--data", "both.json", *SMALL]) == 0
    out = capfd.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= 80
    assert re.search(r"^ *mu +", out, re.M) and re.search(r"Verdict: (reliable|corrected|unreliable)\.", out)
    for words in ("k̂ of the flow", "ESS of the flow", "log evidence", "±", "time"):
        assert words in out


def test_an_unreliable_fit_is_named_so_and_ends_with_status_0(folder, capfd):
    (folder / "far.py").write_text(
        "import torch\ndef log_density(x):\n    return -(1 + x[:, 0] ** 2).log()\n"  # a Cauchy density: no mean
    )
    assert main(["sample", "far.py:log_density", "--dim", "1", "--flow", "gaussian", *SMALL]) == 0
    assert "Verdict: unreliable." in capfd.readouterr().out


def test_same_seed_same_result(folder, capfd):
    results = []
    for seed in ("1", "1", "2"):
        assert main(["sample", "models.py:log_density", "--dim", "2", "--seed", seed, "--json", *SMALL]) == 0
        results.append(json.loads(capfd.readouterr().out)["log_evidence"])
    assert results[0] == results[1] != results[2]


def test_known_densities_by_name(folder, capfd):
    assert main(["sample", "--list"]) == 0
    out = capfd.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(vf.catalogue.names())
    assert sum("--data DIR" in line for line in out.splitlines()) == 2
    assert main(["sample", "banana", "--dim", "10", "--flow", "gaussian", "--json", *SMALL]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["dim"] == 10 and result["known_log_z"] == 0.0


def test_people_see_the_error_of_a_known_normaliser(folder, capfd):
    assert main(["sample", "u2", *SMALL]) == 0
    found = re.search(r"known to be +2\.157 \(quadrature on a grid\); error ([+-]\d\.\d{3})", capfd.readouterr().out)
    assert found and abs(float(found[1])) < 0.5


def test_demo_names_its_picture_last(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "20", "--no-progress"]) == 0
    out = capfd.readouterr().out
    assert "Eight schools" in out and "theta[7]" in out and "Verdict:" in out
    assert out.splitlines()[-1] == "picture: demo.png"
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert main(["demo", "--steps", "20", "--no-progress", "--out", "results"]) == 0
    assert "posterior.png" in capfd.readouterr().out.splitlines()[-1]
    assert (tmp_path / "results" / "posterior.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["demo.png"]


def test_plot_writes_a_picture_of_the_kind_named(folder, capfd):
    line = ["sample", "models.py:log_density", "--dim", "2", "--plot", "new/fit.svg", "--json", *SMALL]
    assert main(line) == 0
    assert json.loads(capfd.readouterr().out)["files"] == [str(Path("new") / "fit.svg")]
    assert "<svg" in (folder / "new" / "fit.svg").read_text()


def test_help_and_version(capfd):
    assert main([]) == 0 and "fit" in capfd.readouterr().out
    assert main(["--version"]) == 0 and vf.__version__ in capfd.readouterr().out


def test_interrupt_before_a_result(folder, capfd, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vf, "fit", interrupted)
    assert main(["fit", "models.py:prior"]) == 130
    assert capfd.readouterr().err == "vi-flows: interrupted before there was a result\n"


def test_the_module_runs_as_a_program():
    environment = {**os.environ, "PYTHONPATH": str(Path(vf.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "vi_flows", "fit", "nowhere.py:f"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def test_data_become_tensors_of_their_kind(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"f": [1, 2.5], "i": [[1], [2]], "b": [true], "n": 3, "s": "a", "w": ["a"], "d": {"x": [1]}}')
    data = read_data(path)
    assert data["f"].dtype == torch.float64 and data["i"].dtype == torch.int64 and data["b"].dtype == torch.bool
    assert data["i"].shape == (2, 1) and (data["n"], data["s"], data["w"]) == (3, "a", ["a"])
    assert torch.equal(data["d"]["x"], torch.tensor([1]))


def test_a_models_own_folder_leaves_the_path(folder):
    before = list(sys.path)
    main(["fit", "models.py:modle"])
    assert sys.path == before


def test_arguments_by_position_and_by_any_name():
    import pyro
    import pyro.distributions as dist

    def by_position(y, /, scale=1.0):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale), obs=y)

    def by_any_name(**data):
        by_position(data["y"])

    y = torch.tensor(1.0)
    assert to_model(by_position, {"y": y, "scale": 2.0}).dim == 1
    assert to_model(by_any_name, {"y": y}).dim == 1
