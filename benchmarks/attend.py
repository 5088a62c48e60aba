"""What looking costs:

    python -m benchmarks.attend dumps        # a whole quickstart: the share of its time that went into watching it
    python -m benchmarks.attend page RUN     # the page of a run, and one of 12 x 12 heads x 512 tokens in Chromium
    python -m benchmarks.attend quadratic    # written-out attention from 128 to 4096 tokens: time and memory

Chromium is Debian's; `CHROMIUM` names another. Times are of this machine: read the shares and ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
HEADS, WIDTH = 4, 64


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The method, adding the seconds of each call to `spent`."""

    def call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **named)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def dumps() -> None:
    """A whole quickstart in this process, its observer's calls on a clock."""
    import train
    from inspection import observer

    writing: list[float] = []
    reporting: list[float] = []
    paging: list[float] = []
    observer.Observer.write = timed(observer.Observer.write, writing)  # type: ignore[method-assign]
    observer.Observer.report = timed(observer.Observer.report, reporting)  # type: ignore[method-assign]
    observer.write_page = timed(observer.write_page, paging)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train.main([f"--run.dir={folder}/run"])
        whole = time.perf_counter() - start
        size = (Path(folder) / "run" / "attention.html").stat().st_size
    print(f"\n{'':<28}{'seconds':>9}{'share':>9}")
    print(f"{'whole run':<28}{whole:>9.2f}{1:>9.1%}")
    print(f"{f'{len(writing)} dumps':<28}{sum(writing):>9.2f}{sum(writing) / whole:>9.1%}")
    rest = sum(reporting) - sum(paging)
    print(f"{'evidence, words, figures':<28}{rest:>9.2f}{rest / whole:>9.1%}")
    print(f"{'the page':<28}{sum(paging):>9.2f}{sum(paging) / whole:>9.1%}   {size / 1e6:.2f} MB")


def large_dump(path: Path, layers: int = 12, heads: int = 12, tokens: int = 512, width: int = 64) -> None:
    """An attention file of random weights, of the shape of a GPT-2 124M and half of its context."""
    from inspection import record

    class Seen:
        pattern = torch.randn(layers, heads, tokens, tokens).mul(3).softmax(-1).tril()
        value_norms = torch.rand(layers, heads, tokens)
        loss = torch.rand(tokens - 1)

    Seen.pattern /= Seen.pattern.sum(-1, keepdim=True)
    Seen.tokens = torch.arange(tokens)  # type: ignore[attr-defined]
    words = [f" word{k}".encode() for k in range(tokens)]
    scores = {"first_token": np.asarray(Seen.pattern[..., 0].mean(-1))}
    record.write(path, [("sample", Seen(), words)], {"step": "1", "tokens_seen": "1"}, scores=scores)


def in_chromium(page: Path, redraws: int = 40) -> tuple[float, list[float]]:
    """Milliseconds from opening the page until it is painted, and of each redraw when another token is chosen."""
    from playwright.sync_api import sync_playwright

    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not browser_path:
        sys.exit("no Chromium: apt-get install chromium, or name one with CHROMIUM=PATH")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1280, "height": 800})
        view.goto(page.resolve().as_uri())
        view.wait_for_selector("html[data-ready]", timeout=60_000)
        painted = view.evaluate("performance.getEntriesByName('painted')[0]?.startTime ?? performance.now()")
        view.locator("body").press("ArrowRight")
        took = []
        for _ in range(redraws):
            view.keyboard.press("ArrowRight")
            view.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            took.append(float(view.evaluate("document.documentElement.dataset.redrawMs")))
        browser.close()
    return painted, took


def page(run: Path) -> None:
    """Build and open the page of a run, then one as large as is promised to stay fluid."""
    from inspection.dump import read
    from inspection.folder import RunAttention
    from inspection.page import PageRun, write_page

    print(f"{'':<28}{'build s':>9}{'MB':>8}{'paint ms':>10}{'redraw ms: median':>20}{'worst':>8}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "attention.html"
        seen = RunAttention.open(run)
        large_dump(Path(folder) / "large.safetensors")
        for name, load, claims, evidence in (
            (str(run), lambda: [seen.dumps[step] for step in seen.steps], seen.claims, seen.evidence),
            ("12 x 12 heads x 512 tokens", lambda: [read(Path(folder) / "large.safetensors")], None, None),
        ):
            start = time.perf_counter()
            report = write_page(out, [PageRun(name, load())], claims, evidence, name)
            built = time.perf_counter() - start
            painted, took = in_chromium(out)
            figures = f"{built:>9.2f}{report.bytes / 1e6:>8.2f}{painted:>10.0f}{statistics.median(took):>20.1f}"
            print(f"{name[-28:]:<28}{figures}{max(took):>8.1f}")


def quadratic() -> None:
    """Forward passes of the written-out attention, and what its weights take in memory."""
    from model import ops

    print(f"{HEADS} heads of width {WIDTH}, one text, fp32, {torch.get_num_threads()} threads; median of 7")
    print(f"{'tokens':>8}{'ms':>10}{'MB of weights':>16}{'ms, against half the tokens':>30}")
    before = 0.0
    for T in LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, T, WIDTH)
        took = []
        for _ in range(8):
            start = time.perf_counter()
            ops.attention_weights(q, k) @ v
            took.append(1000 * (time.perf_counter() - start))
        now = statistics.median(took[1:])
        ratio = f"{now / before:.1f} x" if before else ""
        print(f"{T:>8}{now:>10.2f}{4 * HEADS * T * T / 1e6:>16.2f}{ratio:>30}")
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(description="What looking at attention costs.")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("dumps", help="the share of a quickstart's time that goes into watching it")
    what.add_parser("page", help="the page of a run, and a large one, in Chromium").add_argument("run", type=Path)
    what.add_parser("quadratic", help="time and memory of attention as texts grow")
    asked = parser.parse_args()
    if asked.what == "dumps":
        dumps()
    elif asked.what == "page":
        page(asked.run)
    else:
        quadratic()


if __name__ == "__main__":
    main()
