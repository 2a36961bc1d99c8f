"""Modules of the report import each other in one direction."""

import ast
import graphlib
from pathlib import Path

import fope_jax.report

DIRECTORY = Path(next(iter(fope_jax.report.__path__)))


def imports(path):
    """Modules of the report that the file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fope_jax.report":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, name = node.module.rpartition(".")
            if package == "fope_jax.report":
                yield name


def test_no_module_imports_itself_through_another():
    graph = {path.stem: set(imports(path)) for path in DIRECTORY.glob("*.py")}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("rows") < order.index("tables") < order.index("page")
