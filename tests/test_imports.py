"""Imports go one way, in functions too, and importing the package changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vi_flows

PACKAGE = Path(vi_flows.__file__).parent
# The house, from the ground up: a module may import of its own room and of the floors below, not of its neighbours'.
FLOORS = [
    {"arguments", "atomic", "errors", "progress", "running", "version"},
    {"flows", "targets"},
    {"inference/bounds", "inference/estimate"},
    {"inference/locate", "inference/train"},
    {"inference/structured", "inference/judge"},
    {"inference/correct", "inference/scoring", "inference/options"},
    {"inference/start"},
    {"inference/candidates"},
    {"inference/rehearse"},
    {"inference/store", "guides", "vae"},
    {"report"},
    {"fitting"},
    {"testing"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
# imported where they are needed only, for they take a while
COSTLY = {"arviz", "pandas", "scipy", "matplotlib", "pyro.infer.mcmc", "torch._inductor", "vi_flows.report"}


def modules():
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(path):
    """The room that a path is in: "flows" of "flows/algebra.py", "inference/judge" of "inference/judge/checks.py"."""
    parts = Path(path).with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "inference" and len(parts) > 1 else parts[0]


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imported(path):
    """(full name, where) of what is imported: at "top", in a "function", or for "types" only."""
    package, found = ["vi_flows", *Path(path).parent.parts], []

    def visit(node, where):
        if isinstance(node, ast.Import):
            found.extend((alias.name, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{stem}.{alias.name}", where) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            where = "function"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            where = "types"
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse((PACKAGE / path).read_text()), "top")
    return found


def ours(name):
    """The module of this package that an imported name is, or is in, as a path; None of others."""
    parts = name.split(".")
    if parts[0] != "vi_flows":
        return None
    for end in (len(parts), len(parts) - 1):
        stem = PACKAGE.joinpath(*parts[1:end])
        if stem.with_suffix(".py").exists():
            return stem.with_suffix(".py").relative_to(PACKAGE).as_posix()
        if (stem / "__init__.py").exists():
            return (stem / "__init__.py").relative_to(PACKAGE).as_posix()
    raise AssertionError(name)


@pytest.mark.parametrize("path", modules())
def test_imports_point_down(path):
    if path == "inference/__init__.py":
        return
    for name, _ in imported(path):
        other = ours(name)
        if other is not None and room(other) != room(path):
            assert floor(room(other)) < floor(room(path)), f"{path} imports {name}"


@pytest.mark.parametrize("path", modules())
def test_functions_import_only_what_takes_a_while(path):
    costly = tuple(COSTLY)
    late = [name for name, where in imported(path) if where == "function" and not name.startswith(costly)]
    assert not late, f"{path} imports {late} in functions"


def test_no_module_is_in_a_circle():
    graph = {
        path: {ours(name) for name, where in imported(path) if where != "types"} - {None, path} for path in modules()
    }
    left = dict(graph)
    while left:  # take away what imports nothing that is left
        free = [path for path, others in left.items() if not others & set(left)]
        assert free, f"among these is a circle: {sorted(left)}"
        for path in free:
            del left[path]


def test_a_folder_has_at_most_a_dozen_files():
    for folder in [PACKAGE / "flows", *(PACKAGE / "flows").iterdir(), *(PACKAGE / "inference").iterdir()]:
        if folder.is_dir():
            assert len(list(folder.glob("*.py"))) <= 12, folder


@pytest.mark.parametrize("path", modules())
def test_heavy_imports_stay_where_they_belong(path):
    names = {name.split(".")[0] for name, where in imported(path) if where == "top"}
    if not path.startswith("report/"):
        assert not names & {"arviz", "matplotlib", "arviz_stats", "jinja2"}
    if path.startswith(("flows/", "inference/")) and path != "flows/distribution.py":
        assert "pyro" not in names  # inference/correct/neutra.py does when chains are run


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
