"""What inspecting attention costs: recording during training, and eager attention on long texts.

python -m benchmarks.attend recording        # a whole quickstart: the share of its time spent on recording
python -m benchmarks.attend quadratic        # eager attention from 128 to 4096 tokens: time and memory
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import Report, parser, report, table

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
HEADS, D_HEAD = 4, 64


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


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("what", choices=["recording", "quadratic"])
    args = options.parse_args()
    with report(f"attend-{args.what}", args.record) as out:
        (measure_recording if args.what == "recording" else measure_quadratic)(out)


if __name__ == "__main__":
    main()
