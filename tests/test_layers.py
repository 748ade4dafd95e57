"""The arrows between the folders point down, and nothing imports in a circle: read from the imports, run nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pipelines"
# From top to bottom; a folder may import from those below it. Folders of one line do not know each other.
LAYERS = [
    {"__main__"},
    {"commands"},
    {"stages"},
    {"evaluation", "planning", "report"},
    {"chain"},
    {"recipe"},
    {"ppo", "feedback"},
    {"training"},
    {"generation"},
    {"models"},
    {"data"},
    {"speed"},
    {"files", "functions", "launch", "ranges"},
    {"errors", "kinds", "__init__"},
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}


def room(module: str) -> str:
    """The folder or file below `pipelines` that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of the project that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipelines":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pipelines"}
    return found


def graph() -> dict[str, set[str]]:
    """Every module of the project and what it imports."""
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = ["pipelines", *path.relative_to(ROOT).with_suffix("").parts]
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports(ast.parse(path.read_text()), set(paths)) - {name} for name, path in paths.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that point up, or sideways to another folder of the same layer."""
    arrows = [(a, b) for a, targets in graph.items() for b in targets if room(a) != room(b)]
    return sorted(f"{a} imports {b}" for a, b in arrows if DEPTH[room(a)] >= DEPTH[room(b)])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, as names in order; empty without any."""
    done, path = set(), []

    def visit(name: str) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        found = next((c for target in sorted(graph.get(name, ())) if (c := visit(target))), [])
        path.pop()
        done.add(name)
        return found

    return next((c for name in sorted(graph) if (c := visit(name))), [])


def test_arrows_point_down():
    assert upward(graph()) == []


def test_no_circle_of_imports():
    assert circle(graph()) == []


def test_no_module_is_longer_than_five_hundred_lines():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


@pytest.mark.parametrize(
    "added, words",
    [
        (("pipelines.data.rows", "pipelines.recipe.schema"), "pipelines.data.rows imports pipelines.recipe.schema"),
        (
            ("pipelines.report.page", "pipelines.planning.costs"),
            "pipelines.report.page imports pipelines.planning.costs",
        ),
    ],
)
def test_a_new_upward_arrow_is_named(added, words):
    arrows = graph()
    arrows[added[0]] = arrows[added[0]] | {added[1]}
    assert words in upward(arrows)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
