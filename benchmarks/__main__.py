"""List the benchmarks:  python -m benchmarks"""

import ast
from pathlib import Path


def main() -> None:
    print("python -m benchmarks.NAME --help says more; --record writes benchmarks/RESULTS.md.\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        docstring = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        if docstring and "\ndef main() -> None:" in text and path.stem != "__main__":
            print(f"  {path.stem:<10} {docstring[0]}")


if __name__ == "__main__":
    main()
