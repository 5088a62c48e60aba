"""The import rules between packages, and the length of functions; pyproject.toml has the rules that ruff checks."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest

from tests.runs import ROOT, python

SCRIPTS = ("train", "sample", "attend", "export", "glassgpt")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "common": ("common",),
    "model": ("common", "model"),
    "data": ("common", "data"),
    "training": ("common", "model", "data", "training"),
    "inspection": ("common", "model", "data.tokenizer", "inspection"),
}
WITHOUT_TORCH = "data.config, model.config, training.config, common.errors, common.files, glassgpt"
MAX_FUNCTION_LINES = 45
FILES = [*(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))]
FILES += [ROOT / f"{script}.py" for script in SCRIPTS]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
    for path in FILES
}
"""Every module of the product, by its dotted name."""


def imported_names(tree: ast.AST) -> set[str]:
    """What the source imports, anywhere in it; `from x import y` gives both x and x.y."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "relative imports are not used"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {name for name in TREES if "." in name or name in SCRIPTS}
GRAPH = {name: imported_names(tree) & MODULES for name, tree in TREES.items()}
"""For each of our modules, which of our modules it imports."""


def test_packages_import_only_what_they_may() -> None:
    assert not [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name not in SCRIPTS
        and not any(f"{other}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[name.split(".")[0]])
    ]


def test_no_module_imports_a_script_or_a_command() -> None:
    commands = {name for name in TREES if name.startswith("inspection.commands.")}
    assert not [name for name, others in GRAPH.items() if name != "glassgpt" and others & set(SCRIPTS)]
    assert not [name for name in MODULES - commands - set(SCRIPTS) if GRAPH[name] & commands]


def test_no_import_cycle() -> None:
    TopologicalSorter(GRAPH).prepare()


def test_model_needs_only_torch_and_jaxtyping() -> None:
    """Only what is for Hugging Face needs more."""
    others = ("model.huggingface", "model.modeling_glass")
    trees = {name: tree for name, tree in TREES.items() if name.startswith("model.") and name not in others}
    outside = {name.split(".")[0] for tree in trees.values() for name in imported_names(tree)}
    assert outside - {"model", "common", *sys.stdlib_module_names} <= {"torch", "jaxtyping"}


def test_settings_are_parsed_without_torch() -> None:
    program = (
        f"import sys, {WITHOUT_TORCH}; sys.exit(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)) or 0)"
    )
    ended = python(program)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", TREES)
def test_functions_are_short(name: str) -> None:
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= MAX_FUNCTION_LINES]
