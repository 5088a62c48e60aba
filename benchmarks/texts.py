"""Texts of your own next to nanoGPT and to one recipe for all texts, at equal time: held-out bits per byte.

    python -m benchmarks.texts --nanogpt PATH book.txt poems.txt ...

Each text is cut at 90% of its characters, where nanoGPT cuts it, and trained on for `--minutes`: by train.py without any
other option, by the recipe of the quickstart, and by nanoGPT's recipe for a CPU (by character, its best checkpoint).
"""

import math
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import common, nanogpt

FIXED = "configs/quickstart.toml"
COLUMNS = ("ours", "one recipe", "nanoGPT", "trigram", "unigram", "uniform")


def cut(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first 90% of the characters, and the rest."""
    characters = text.read_text(encoding="utf-8")
    end = int(0.9 * len(characters))
    parts = folder / "train.txt", folder / "val.txt"
    for path, part in zip(parts, (characters[:end], characters[end:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def train_ours(parts: tuple[Path, Path], minutes: float, *recipe: str) -> tuple[dict[str, float], float]:
    """Bits per byte by row of the last table, `this model` among them, and seconds of the command."""
    train, val = parts
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--data.source={train}", f"--data.val={val}", f"--train.minutes={minutes:g}"]
        result = common.run_command([sys.executable, "train.py", *recipe, *options, f"--run.dir={folder}/run"])
    print(result.output, file=sys.stderr)
    rows = re.findall(r"^  (this model|trigram|unigram|uniform) .* (\d+\.\d+)$", result.output, re.M)
    return {name: float(bits) for name, bits in rows}, result.seconds


def train_nanogpt(clone: Path, text: Path, val: Path, minutes: float) -> tuple[float, float]:
    """Bits per byte of its best checkpoint, and seconds of its train.py; the number of steps is that of the time."""
    with nanogpt.copied(clone, text) as folder:
        probe = nanogpt.train(folder, "--max_iters=200", "--eval_iters=1")
        step = (probe.seconds_until("iter 200:") - probe.seconds_until("iter 100:")) / 100
        evaluation = 40 / 3 * step  # forward passes on both splits
        steps = int((60 * minutes - probe.seconds_until("iter 0:") - evaluation) / (step + evaluation / 250))
        result = nanogpt.train(folder, f"--max_iters={steps}", f"--lr_decay_iters={steps}")
        loss = nanogpt.whole_split_loss(folder)
    characters, n_bytes = len(val.read_text(encoding="utf-8")), val.stat().st_size
    return loss / math.log(2) * characters / n_bytes, result.seconds


def main() -> None:
    options = common.parser(__doc__, rounds=1, nanogpt=True)
    options.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    options.add_argument("--minutes", type=float, default=2.0)
    args = options.parse_args()
    rows = []
    with common.report("texts", args.record) as out:
        for text in args.texts:
            with tempfile.TemporaryDirectory() as folder:
                parts = cut(text, Path(folder))
                ours, seconds = train_ours(parts, args.minutes)
                fixed, fixed_seconds = train_ours(parts, args.minutes, FIXED)
                theirs = train_nanogpt(args.nanogpt, text, parts[1], args.minutes) if args.nanogpt else (math.nan, 0)
            bits = [ours.pop("this model"), fixed["this model"], theirs[0], *(ours[name] for name in COLUMNS[3:])]
            times = f"{seconds:.0f}, {fixed_seconds:.0f}, {theirs[1]:.0f}"
            rows.append((text.name, f"{text.stat().st_size / 1e3:,.0f}", *(f"{b:.3f}" for b in bits), times))
            print(*rows[-1], file=sys.stderr, flush=True)
        out.add(f"Held-out bits per byte after {args.minutes:g} minutes each.")
        out.add(common.table(("text", "kB", *COLUMNS, "seconds of the three"), rows))


if __name__ == "__main__":
    main()
