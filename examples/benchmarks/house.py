"""How a package is built, in numbers read from its source: folders, circles of imports, lengths, constants.

    python examples/benchmarks/house.py vi_flows

An import for types only (``if TYPE_CHECKING``) is not counted. What points up is read from the table FLOORS of
tests/test_imports.py beside the package, where there is one. Nothing of the package is imported.
"""

import argparse
import ast
import statistics
import tokenize
from collections import Counter
from pathlib import Path

LONG_FUNCTION, LONG_FILE = 40, 300  # lines

Import = tuple[str, str, bool]  # module that imports, module that is imported, whether in a function


def imports(root: Path, tree: ast.Module, path: str) -> list[Import]:
    """What a module imports of its own package."""
    package, out = [root.name, *Path(path).parent.parts], []

    def visit(node: ast.AST, late: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        out.extend((path, other, late) for other in sorted({module(root, name) for name in names} - {None, path}))
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, late)

    visit(tree, False)
    return out


def module(root: Path, name: str) -> str | None:
    """The file of the package that an imported name is, or is in; None of other packages."""
    first, *parts = name.split(".")
    for stem in (root.joinpath(*parts), root.joinpath(*parts[:-1])) if first == root.name else ():
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file.relative_to(root).as_posix()
    return None


def circled(edges: list[Import]) -> int:
    """How many modules can be reached from themselves."""
    graph: dict[str, set[str]] = {}
    for path, other, _ in edges:
        graph.setdefault(path, set()).add(other)

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    return sum(path in reached(path) for path in graph)


def upward(root: Path, edges: list[Import]) -> str:
    """How many imports do not point to a lower floor; "–" without a table of floors."""
    table = root.parent / "tests" / "test_imports.py"
    nodes = ast.parse(table.read_text()).body if table.exists() else []
    floors = [ast.literal_eval(n.value) for n in nodes if isinstance(n, ast.Assign) and n.targets[0].id == "FLOORS"]
    if not floors:
        return "–"
    floor = {name: i for i, names in enumerate(floors[0]) for name in names}

    def room(path: str) -> str:
        parts = Path(path).with_suffix("").parts
        return "/".join(parts[:2]) if "/".join(parts[:2]) in floor else parts[0]

    return str(sum(room(a) != room(b) and floor[room(a)] <= floor[room(b)] for a, b, _ in edges))


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function from its first statement on, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def constants(file: Path, tree: ast.Module) -> dict[str, bool]:
    """The constants of a module, and whether each has a comment, on its lines or alone above, or is a Bound."""
    with tokenize.open(file) as source:
        comments = [t for t in tokenize.generate_tokens(source.readline) if t.type == tokenize.COMMENT]
    commented = {token.start[0] for token in comments}
    above = {token.start[0] + 1 for token in comments if token.line.lstrip().startswith("#")}
    out = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "Bound"
            reason = bound or node.lineno in above or bool(commented & set(range(node.lineno, node.end_lineno + 1)))
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            out |= {name: reason for name in names if name.isupper()}
    return out


def measure(root: Path) -> dict[str, object]:
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    inside = [name for name in files if name.startswith("inference/")]
    folders = Counter(Path(name).parent.as_posix() for name in files)
    edges = [edge for name, tree in trees.items() for edge in imports(root, tree, name)]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    lengths = [code_lines(node) for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds)]
    named = {name: constants(files[name], trees[name]) for name in inside}
    shared = Counter(constant for names in named.values() for constant in names)
    engine = max((count for folder, count in folders.items() if folder.split("/")[0] == "inference"), default=0)
    typical = f"{statistics.fmean(lengths):.1f}, {statistics.median(lengths):.0f}, {max(lengths)}"
    bare = sum(list(names.values()).count(False) for names in named.values())
    return {
        "rooms (folders) in inference/": sum(folder.startswith("inference/") for folder in folders),
        "most files in a folder: of inference/, of all": f"{engine}, {max(folders.values())}",
        "modules in circles": circled(edges),
        "imports that do not point down": upward(root, edges),
        "imports of ours inside functions": sum(late for *_, late in edges),
        "modules, lines of the package": f"{len(files)}, {sum(lines.values()):,}",
        "lines of a function without docstring: mean, median, most": typical,
        f"functions above {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in lengths),
        f"files above {LONG_FILE} lines": sum(count > LONG_FILE for count in lines.values()),
        "constants in inference/, without a comment or a Bound": f"{sum(map(len, named.values()))}, {bare}",
        "names of constants in several modules of inference/": sum(count > 1 for count in shared.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the folder of the package")
    for what, number in measure(parser.parse_args().package.resolve()).items():
        print(f"{what:60}{number!s:>20}")


if __name__ == "__main__":
    main()
