"""Who may import whom, read from the source; and other rules that a reader of the code relies on."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "sample", "attend")
MAY_IMPORT: dict[str, set[str]] = {
    "common": {"common"},
    "model": {"model", "common"},
    "data": {"data", "common"},
    "inspection": {"inspection", "model", "common"},
    "training": {"training", "model", "data", "common"},
    **{script: {"common", "model", "data", "inspection", "training"} for script in SCRIPTS},
}
LEAF = "common.errors"
WITHOUT_TORCH = ("data.config", "model.config", "training.config", "common.errors")


def sources() -> dict[str, Path]:
    """Every module of the program, by its dotted name."""
    files = [path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS if (ROOT / f"{script}.py").exists()]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def named(tree: ast.AST, package: str) -> set[str]:
    """What a piece of source imports, anywhere in it, `from x import y` as both x and x.y."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports() -> dict[str, set[str]]:
    """For each of our modules, which of our modules it imports."""
    modules = sources()
    # A package's own empty __init__ binds nothing together, so "model" alone is no edge.
    ours = {name for name in modules if "." in name} | set(SCRIPTS)
    packages = {n: n if path.name == "__init__.py" else n.rpartition(".")[0] for n, path in modules.items()}
    return {name: named(parsed(path), packages[name]) & ours for name, path in modules.items()}


def test_each_part_imports_only_what_it_may() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if other != LEAF and other.split(".")[0] not in MAY_IMPORT[name.split(".")[0]]
    ]
    assert not wrong


def test_the_errors_are_a_leaf() -> None:
    graph = imports()
    assert LEAF in graph and not graph[LEAF]


def test_only_tests_import_a_script() -> None:
    assert not [name for name, others in imports().items() if others & set(SCRIPTS)]


def test_there_are_no_circles() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_mathematics_needs_no_framework() -> None:
    """The model's core stands on torch and jaxtyping; only the bridge to other formats needs more."""
    outside = {
        name: {n.split(".")[0] for n in named(parsed(path), "model")} - {"model", *sys.stdlib_module_names}
        for name, path in sources().items()
        if name.startswith("model.") and "huggingface" not in name
    }
    assert set().union(*outside.values()) <= {"torch", "jaxtyping"}, outside


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_settings_are_read_without_torch(module: str) -> None:
    """In a process of its own, as this one has torch already."""
    program = f"import sys, {module}; sys.exit(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_importing_has_no_effect() -> None:
    """At module level stand definitions and constants: no call, loop or condition but a guard."""
    imported, defined = (ast.Import, ast.ImportFrom), (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assigned = (ast.Assign, ast.AnnAssign, ast.AugAssign)
    guards = ("__name__ == '__main__'", "TYPE_CHECKING")
    wrong = []
    for name, path in sources().items():
        for node in parsed(path).body:
            documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards
            if not (documents or guard or isinstance(node, imported + defined + assigned)):
                wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong


def test_nothing_is_unpickled_or_evaluated() -> None:
    wrong = []
    for name, path in sources().items():
        tree = parsed(path)
        wrong += [f"{name} imports {m}" for m in named(tree, "") if m.split(".")[0] in ("pickle", "marshal", "shelve")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call in ("eval", "exec", "compile", "__import__", "torch.load", "torch.save"):
                    wrong.append(f"{name}, line {node.lineno}: {call}")
                if call.endswith(("np.load", "numpy.load")) and "allow_pickle=True" in ast.unparse(node):
                    wrong.append(f"{name}, line {node.lineno}: a pickled array")
    assert not wrong


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for name, path in sources().items():
        text = path.read_text("utf-8")
        limit = 250 if name == "model.gpt" else 330
        if (lines := text.count("\n")) > limit:
            wrong.append(f"{name} has {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 50:
                    wrong.append(f"{name}.{node.name} has {length} lines")
    assert not wrong


def test_each_file_says_where_it_stands() -> None:
    silent = [
        name for name, path in sources().items() if path.name != "__init__.py" and not ast.get_docstring(parsed(path))
    ]
    assert not silent
