"""The import rules between packages, and other rules that hold for the whole source."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "sample", "attend", "glassgpt")
PACKAGES = ("common", "model", "data", "training", "inspection")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "common": ("common",),
    "model": ("common", "model"),
    "data": ("common", "data"),
    "training": ("common", "model", "data", "training"),
    "inspection": ("common", "model", "data.tokenizer", "inspection"),
    **{script: PACKAGES for script in SCRIPTS},
}
WITHOUT_TORCH = ("data.config", "model.config", "training.config", "common.errors", "common.files")
MAX_FUNCTION_LINES = 45
MAX_PARAMETERS = 7


def sources() -> dict[str, Path]:
    """Every module of the product, by its dotted name."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported_names(tree: ast.AST) -> set[str]:
    """What the source imports, anywhere in it; `from x import y` gives both x and x.y."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """For each of our modules, which of our modules it imports."""
    modules = {name for name in sources() if "." in name} | set(SCRIPTS)
    return {name: imported_names(parsed(path)) & modules for name, path in sources().items()}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_packages_import_only_what_they_may() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in sorted(others)
        if not any(other == allowed or other.startswith(f"{allowed}.") for allowed in MAY_IMPORT[name.split(".")[0]])
    ]
    assert not wrong


def test_no_module_imports_a_script_or_a_command() -> None:
    graph = import_graph()
    assert not [name for name, others in graph.items() if others & set(SCRIPTS)]
    commands = {name for name in graph if name.startswith("inspection.commands.")}
    libraries = {name for name in graph if name not in commands and name not in SCRIPTS}
    assert not [name for name in libraries if graph[name] & commands]


def test_no_import_cycle() -> None:
    graph = import_graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_model_needs_only_torch_and_jaxtyping() -> None:
    """Only the Hugging Face conversion needs more."""
    outside = {
        name: {n.split(".")[0] for n in imported_names(parsed(path))} - {"model", "common", *sys.stdlib_module_names}
        for name, path in sources().items()
        if name.startswith("model.") and "huggingface" not in name
    }
    assert set().union(*outside.values()) <= {"torch", "jaxtyping"}, outside


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_settings_are_parsed_without_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_nothing_is_unpickled_or_evaluated() -> None:
    wrong = []
    for name, path in sources().items():
        tree = parsed(path)
        wrong += [
            f"{name} imports {m}" for m in imported_names(tree) if m.split(".")[0] in ("pickle", "marshal", "shelve")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if "_object" in call and call.startswith("dist."):
                    wrong.append(f"{name}, line {node.lineno}: {call} pickles")
                if call in ("eval", "exec", "compile", "__import__", "torch.load", "torch.save"):
                    wrong.append(f"{name}, line {node.lineno}: {call}")
                if call.endswith(("np.load", "numpy.load")) and "allow_pickle=True" in ast.unparse(node):
                    wrong.append(f"{name}, line {node.lineno}: a pickled array")
    assert not wrong


def test_functions_and_signatures_stay_short() -> None:
    wrong = []
    for name, path in sources().items():
        for node in functions(path):
            lines = (node.end_lineno or 0) - node.lineno + 1
            parameters = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            parameters = [p for p in parameters if p not in ("self", "cls")]
            if lines > MAX_FUNCTION_LINES:
                wrong.append(f"{name}.{node.name} has {lines} lines")
            if len(parameters) > MAX_PARAMETERS:
                wrong.append(f"{name}.{node.name} has {len(parameters)} parameters")
    assert not wrong


def test_every_module_has_a_docstring() -> None:
    assert not [
        n for n, path in sources().items() if path.name != "__init__.py" and not ast.get_docstring(parsed(path))
    ]
