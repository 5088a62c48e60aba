"""The benchmarks, and the first line of what each says of itself:  python -m benchmarks"""

from __future__ import annotations

import ast
from pathlib import Path


def main() -> None:
    print("python -m benchmarks.NAME --help says more; --record writes benchmarks/RESULTS.md.\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        if said and "\ndef main() -> None:" in text and path.stem != "__main__":
            print(f"  {path.stem:<10} {said[0]}")


if __name__ == "__main__":
    main()
