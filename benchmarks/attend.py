"""What inspecting attention costs: recording during training, eager attention on long texts, typing into the page.

python -m benchmarks.attend recording        # a whole quickstart: the share of its time spent on recording
python -m benchmarks.attend quadratic        # eager attention from 128 to 4096 tokens: time and memory
python -m benchmarks.attend page             # of a quickstart in runs/quickstart, in Chromium; needs playwright
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Report, parser, report, table

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
HEADS, D_HEAD = 4, 64
TYPING = """async (T) => {
  const ms = async (action) => { const start = performance.now(); await action(); return performance.now() - start; };
  const show = (own) => change({ text: OWN, own, query: Infinity, key: -1 });
  const timeToDraw = (own) => ms(async () => { await show(own); await new Promise(requestAnimationFrame); });
  let [text, atEnd, nearStart] = [page.own.repeat(5), [], []];
  while (backend.encode(text).length > T - 8) text = text.slice(0, -1);
  await show(text);
  for (const letter of " and th") atEnd.push(await timeToDraw(text += letter));
  for (let k = 2; k < 9; k++) nearStart.push(await timeToDraw(text.slice(0, k) + "x" + text.slice(k)));
  return [atEnd, nearStart, [await ms(rankHeads)]];
}"""


def timed(method: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """The method, appending the seconds of each call to `times`."""

    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            times.append(time.perf_counter() - start)

    return call


def measure_recording(out: Report) -> None:
    """A quickstart in this process, with the recorder's callbacks timed."""
    import train
    from inspection.recorder import AttentionRecorder

    times: dict[str, list[float]] = {"on_eval": [], "on_end": []}
    for name, calls in times.items():
        setattr(AttentionRecorder, name, timed(getattr(AttentionRecorder, name), calls))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train.main([f"--run.dir={folder}/run"])
        whole = time.perf_counter() - start
    evals, end = sum(times["on_eval"]), sum(times["on_end"])
    names = ("whole run", f"recording, {len(times['on_eval'])} evaluations", "ablation, plots and page at the end")
    rows = [(n, f"{s:.2f}", f"{s / whole:.1%}") for n, s in zip(names, (whole, evals, end), strict=True)]
    out.add(table(("a quickstart", "seconds", "share"), rows))


def measure_quadratic(out: Report) -> None:
    """Forward passes of eager attention, and the memory of the pattern."""
    from model import functional

    out.add(f"{HEADS} heads, d_head {D_HEAD}, one text, fp32, {torch.get_num_threads()} threads; medians of 7")
    before, rows = 0.0, []
    for T in LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, T, D_HEAD)
        times: list[float] = []
        for _ in range(8):
            timed(lambda q=q, k=k, v=v: functional.attention_pattern(q, k) @ v, times)()
        ms = 1000 * statistics.median(times[1:])
        rows.append((T, f"{ms:.2f}", f"{4 * HEADS * T * T / 1e6:.2f}", f"{ms / before:.1f} x" if before else ""))
        before = ms
    out.add(table(("tokens", "ms", "MB of pattern", "ms, of half the tokens"), rows))


def measure_page(out: Report) -> None:
    """Milliseconds from a typed letter to the drawn page, at the end and near the beginning of texts of 90 and 160 tokens."""
    from playwright.sync_api import sync_playwright

    path = Path("runs/quickstart/attention.html").resolve()
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        rows = [(f"first paint of {path.stat().st_size / 1e6:.1f} MB", f"{paint:.0f}")]
        for T in (90, 160):
            at_end, near_start, heads = (statistics.median(ms) for ms in page.evaluate(TYPING, T))
            rows += [(f"a letter at the end of {T} tokens", f"{at_end:.0f}")]
            rows += [
                (f"a letter near the start of {T} tokens", f"{near_start:.0f}"),
                ("all heads ranked", f"{heads:.0f}"),
            ]
    out.add(table(("the page of a quickstart", "ms"), rows))


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("what", choices=["recording", "quadratic", "page"])
    args = options.parse_args()
    measure = {"recording": measure_recording, "quadratic": measure_quadratic, "page": measure_page}[args.what]
    with report(f"attend-{args.what}", args.record) as out:
        measure(out)


if __name__ == "__main__":
    main()
