"""Imports go one way, and importing the package changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vi_flows

PACKAGE = Path(vi_flows.__file__).parent
GROUND = {"arguments", "errors"}  # all may import these, which import nothing of ours
# what each part may import of the others at module level, as CONTRIBUTING.md says
MAY_IMPORT = {
    "flows": set(),
    "targets": set(),
    "inference": {"flows", "targets"},
    "guides": {"flows", "targets", "inference"},
    "vae": {"flows", "targets", "inference"},
    "report": {"flows", "targets", "inference", "guides", "vae"},
    "testing": {"flows", "targets", "inference", "guides", "vae", "report"},
}


def modules():
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(path):
    """Full names imported at module level, relative ones resolved; not those inside functions or TYPE_CHECKING."""
    package = ["vi_flows", *Path(path).parent.parts]
    names, todo = set(), list(ast.parse((PACKAGE / path).read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler, ast.With, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)  # of these; those of functions run later
    return names


@pytest.mark.parametrize("path", modules())
def test_direction(path):
    part = Path(path).parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("vi_flows.")}
    if part in GROUND:
        assert not ours
    elif part in MAY_IMPORT:  # the others are the top: __init__.py, __main__.py, cli
        assert ours <= MAY_IMPORT[part] | {part} | GROUND


@pytest.mark.parametrize("path", modules())
def test_heavy_imports_stay_where_they_belong(path):
    names = {name.split(".")[0] for name in imported(path)}
    if not path.startswith("report/"):
        assert not names & {"arviz", "matplotlib", "arviz_stats", "jinja2"}
    if path.startswith(("flows/", "inference/")) and path != "flows/distribution.py":
        assert "pyro" not in names  # inference/neutra.py does when chains are run


def test_import_has_no_side_effects():
    code = """
import sys, warnings
import pyro, torch
before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
          torch.distributions.Distribution._validate_args, pyro.settings.get(), list(warnings.filters))
import vi_flows
after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
         torch.distributions.Distribution._validate_args, pyro.settings.get(), list(warnings.filters))
assert before == after, (before, after)
assert not {"arviz", "matplotlib", "pandas", "xarray"} & set(sys.modules), sorted(sys.modules)
"""
    runs(code)


def test_report_and_vae_are_reached_from_the_root_when_they_are_named():
    code = """
import sys
import vi_flows as vf
assert not {"arviz", "matplotlib", "jinja2", "vi_flows.vae", "vi_flows.report"} & set(sys.modules), sorted(sys.modules)
assert {"report", "vae", "fit"} <= set(dir(vf)) and not hasattr(vf, "no_such_name")
assert vf.vae.VAE.__module__ == "vi_flows.vae.model" and "matplotlib" not in sys.modules
assert vf.report.summary.__module__ == "vi_flows.report.table" and "matplotlib" in sys.modules
"""
    runs(code)


def runs(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
