"""How costs grow with size: a step with the model and the context, and preparing, evaluating, the page, processes.

python -m benchmarks.growth                  # ten minutes on two cores; --record also draws docs/images/growth.png
python -m benchmarks.growth model evaluations

Each series grows in one quantity only. `exponent` is the slope of log(cost) over log(size) from the size before: 1 is linear.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.prepare import OURS, write_text
from benchmarks.steps import write_random_tokens

Point = tuple[str, float, float, float]  # label, size, seconds, megabytes
Shape = tuple[int, int, int, int]  # layers, heads, d_model, vocabulary
SHAPES = ((2, 4, 128, 65), (4, 4, 256, 65), (6, 6, 384, 65), (8, 8, 512, 65), (12, 12, 768, 50257))
CONTEXTS = (64, 256, 1024, 4096)
TOKENS = 4096  # in a step, whatever the context
SMALL = ("--model.n_layers=2", "--model.n_heads=4", "--model.d_model=64", "--model.context=64", "--train.batch_size=4")


def step(folder: Path, shape: Shape, context: int) -> tuple[float, float, float]:
    """Parameters in matrices, seconds a step, and peak megabytes of a model of the preset gpt2."""
    *sizes, vocab_size = shape
    write_random_tokens(folder / "tokens.npy", vocab_size)
    names = ("n_layers", "n_heads", "d_model")
    model = [f"--model.{name}={value}" for name, value in zip(names, sizes, strict=True)]
    model += [f"--model.context={context}", f"--train.batch_size={TOKENS // context}", "--model.preset=gpt2"]
    options = [*model, "--train.steps=5000", "--train.compile=off"]
    command = [sys.executable, "-m", "benchmarks.steps", str(folder / "tokens.npy"), str(vocab_size), *options]
    with common.Worker(command) as worker:
        results = [worker.ask(1) for _ in range(3)]
        fastest = min(result["seconds"] for result in results)
        return worker.ready["matrices"], fastest, results[-1]["megabytes"]


def grow_model(folder: Path) -> Iterator[Point]:
    """Steps of models of 0.4 to 124 M parameters in matrices, context 256."""
    for shape in SHAPES:
        parameters, seconds, megabytes = step(folder, shape, 256)
        yield f"{parameters / 1e6:.1f} M", parameters, seconds, megabytes


def grow_context(folder: Path) -> Iterator[Point]:
    """Steps of as many tokens in longer texts, 6 layers of 384: attention's share grows with the length."""
    for context in CONTEXTS:
        yield f"{context} tokens", context, *step(folder, (6, 6, 384, 65), context)[1:]


def grow_text(folder: Path) -> Iterator[Point]:
    """Preparing 10 MB to 1 GB of text with tiktoken's gpt2, all cores."""
    script = folder / "ours.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(common.ROOT)!r})\n{OURS}")
    for megabytes in (10, 100, 1000):
        text = folder / "text.txt"
        write_text(text, megabytes * 1_000_000)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            words = [str(script), str(text), "gpt2", "2", cache]
            result = common.run_command([sys.executable, *words])
        yield f"{megabytes} MB", megabytes, result.seconds, result.megabytes


def train(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> common.CommandResult:
    """A run of train.py on the built-in stories."""
    command = [sys.executable, *launcher, "train.py", *options, f"--run.dir={folder}", "--log.sample_tokens=0"]
    return common.run_command(command)


def grow_evaluations(folder: Path) -> Iterator[Point]:
    """1,000 steps of a small model with 10 to 1,000 evaluations, all recorded or thinned out."""
    for count in (10, 100, 1000):
        every = f"--train.eval_every={1000 // count}"
        options = (*SMALL, "--train.steps=1000", "--train.patience=0", every, "--train.eval_tokens=2000")
        result = train(folder / f"run{count}", *options, "--train.save_every=1000")
        yield f"{count} evaluations", count, result.seconds, result.megabytes


def grow_page(folder: Path) -> Iterator[Point]:
    """Building the page for 8 to 144 heads of 16 dimensions; the megabytes are those of the page."""
    for layers, heads in ((2, 4), (4, 4), (6, 6), (8, 8), (12, 12)):
        run = folder / f"run{layers}"
        sizes = (f"--model.n_layers={layers}", f"--model.n_heads={heads}", f"--model.d_model={16 * heads}")
        train(run, *sizes, "--train.steps=99", "--train.eval_every=4", "--run.stop_at_step=8")  # before any ablation
        result = common.run_command([sys.executable, "attend.py", "page", str(run)])
        megabytes = (run / "attention.html").stat().st_size / 1e6
        yield f"{layers} x {heads} heads", layers * heads, result.seconds, megabytes


def grow_processes(folder: Path) -> Iterator[Point]:
    """A step of the quickstart by 1, 2 and 4 processes of one thread: -1 is linear, as long as each has a core."""
    for count in (1, 2, 4):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
        options = ("--train.steps=120", "--train.eval_every=120", "--run.threads=1", "--log.attention=off")
        result = train(folder / f"run{count}", *options, launcher=launcher)
        lines = map(json.loads, (folder / f"run{count}" / "metrics.jsonl").read_text().splitlines())
        speed = median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        yield f"{count} processes", count, 16 * 160 / speed, result.megabytes


SERIES: dict[str, Callable[[Path], Iterator[Point]]] = {
    "model": grow_model,
    "context": grow_context,
    "text": grow_text,
    "evaluations": grow_evaluations,
    "page": grow_page,
    "processes": grow_processes,
}


def draw(series: dict[str, list[Point]], path: Path) -> None:
    """Seconds over size, both relative to the smallest, on logarithmic axes."""
    from common.figures import figure

    with figure(path, "Seconds over size, relative to the smallest", "dashed: linear") as axes:
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel="seconds")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        axes.axline((1, 1), (10, 10), color="gray", linestyle="--", linewidth=0.8)
        for name, points in series.items():
            sizes, seconds = ([point[k] / points[0][k] for point in points] for k in (1, 2))
            axes.plot(sizes, seconds, marker="o", markersize=3, label=name)
        axes.legend()


def main() -> None:
    options = common.parser(__doc__, rounds=1)
    options.add_argument("series", nargs="*", choices=[*SERIES, []], help="default: all")
    args = options.parse_args()
    with common.report("growth", args.record) as out:
        rows, measured = [], {}
        for name in args.series or SERIES:
            with tempfile.TemporaryDirectory() as folder:
                points = measured[name] = list(SERIES[name](Path(folder)))
            for before, (label, size, seconds, megabytes) in zip([None, *points], points, strict=False):
                slope = "" if not before else f"{math.log(seconds / before[2]) / math.log(size / before[1]):.2f}"
                rows.append((f"{name}, {label}", f"{seconds:.2f}", slope, f"{megabytes:,.1f}"))
        out.add(common.table(("", "seconds", "exponent", "MB"), rows))
        if args.record and len(measured) == len(SERIES):
            draw(measured, common.ROOT / "docs" / "images" / "growth.png")


if __name__ == "__main__":
    main()
