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

from benchmarks.results import Page, page
from benchmarks.side_by_side import table

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


def dumps(say: Page) -> None:
    """A whole quickstart in this process, its observer's calls on a clock."""
    import train
    from inspection import recorder as observer

    writing: list[float] = []
    reporting: list[float] = []
    paging: list[float] = []
    observer.AttentionRecorder.write = timed(observer.AttentionRecorder.write, writing)  # type: ignore[method-assign]
    observer.report_heads = timed(observer.report_heads, reporting)  # type: ignore[method-assign]
    observer.write_page = timed(observer.write_page, paging)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train.main([f"--run.dir={folder}/run"])
        whole = time.perf_counter() - start
        size = (Path(folder) / "run" / "attention.html").stat().st_size
    parts = {
        "whole run": whole,
        f"{len(writing)} dumps": sum(writing),
        "evidence, words, figures": sum(reporting) - sum(paging),
        f"the page, {size / 1e6:.2f} MB": sum(paging),
    }
    rows = [(name, f"{took:.2f}", f"{took / whole:.1%}") for name, took in parts.items()]
    say.say(table(("a quickstart", "seconds", "share"), rows))


def large_dump(path: Path, layers: int = 12, heads: int = 12, tokens: int = 512, width: int = 64) -> None:
    """An attention file of random weights, of the shape of a GPT-2 124M and half of its context."""
    from inspection.attention_file import AttentionRecord, write_attention_file

    class Seen:
        pattern = torch.randn(layers, heads, tokens, tokens).mul(3).softmax(-1).tril()
        value_norms = torch.rand(layers, heads, tokens)
        loss = torch.rand(tokens - 1)

    Seen.pattern /= Seen.pattern.sum(-1, keepdim=True)
    Seen.tokens = torch.arange(tokens)  # type: ignore[attr-defined]
    text = AttentionRecord.from_cache("sample", Seen(), lambda token: f" word{token}".encode())
    scores = {"first_token": np.asarray(Seen.pattern[..., 0].mean(-1))}
    write_attention_file(path, [text], {"step": "1", "tokens_seen": "1"}, scores)


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


def pages(run: Path, say: Page) -> None:
    """Build and open the page of a run, then one as large as is promised to stay fluid."""
    from inspection.attention_file import read_attention_file
    from inspection.page_builder import PageRun, write_page
    from inspection.run_reader import RunFiles

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "attention.html"
        seen = RunFiles.open(run)
        large_dump(Path(folder) / "large.safetensors")
        for name, load, claims, evidence in (
            (run.name, lambda: [seen.attention_files[step] for step in seen.steps], seen.findings, seen.ablation),
            (
                "12 x 12 heads x 512 tokens",
                lambda: [read_attention_file(Path(folder) / "large.safetensors")],
                None,
                None,
            ),
        ):
            start = time.perf_counter()
            report = write_page(out, [PageRun(name, load())], claims, evidence, name)
            built = time.perf_counter() - start
            painted, took = in_chromium(out)
            drawn = (f"{painted:.0f}", f"{statistics.median(took):.1f}", f"{max(took):.1f}")
            rows.append((name, f"{built:.2f}", f"{report.bytes / 1e6:.2f}", *drawn))
    say.say(table(("page", "build s", "MB", "paint ms", "redraw ms, median", "worst"), rows))


def quadratic(say: Page) -> None:
    """Forward passes of the written-out attention, and what its weights take in memory."""
    from model import functional

    say.say(f"{HEADS} heads of width {WIDTH}, one text, fp32, {torch.get_num_threads()} threads; median of 7")
    before, rows = 0.0, []
    for T in LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, T, WIDTH)
        took = []
        for _ in range(8):
            start = time.perf_counter()
            functional.attention_pattern(q, k) @ v
            took.append(1000 * (time.perf_counter() - start))
        now = statistics.median(took[1:])
        ratio = f"{now / before:.1f} x" if before else ""
        rows.append((T, f"{now:.2f}", f"{4 * HEADS * T * T / 1e6:.2f}", ratio))
        before = now
    say.say(table(("tokens", "ms", "MB of weights", "ms, against half the tokens"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="What looking at attention costs.")
    what = parser.add_subparsers(dest="what", required=True)
    named = [
        what.add_parser("dumps", help="the share of a quickstart's time that goes into watching it"),
        what.add_parser("page", help="the page of a run, and a large one, in Chromium"),
        what.add_parser("quadratic", help="time and memory of attention as texts grow"),
    ]
    named[1].add_argument("run", type=Path)
    for one in named:
        one.add_argument("--record", action="store_true", help="write the results to benchmarks/RESULTS.md")
    asked = parser.parse_args()
    with page(f"attend-{asked.what}", asked.record) as say:
        if asked.what == "dumps":
            dumps(say)
        elif asked.what == "page":
            pages(asked.run, say)
        else:
            quadratic(say)


if __name__ == "__main__":
    main()
