"""Texts of your own next to nanoGPT and to one recipe for all texts, at equal time: held-out bits per byte.

    python -m benchmarks.texts --nanogpt PATH book.txt folder ...

Each text, or file of a folder, is cut at 90% of its characters, where nanoGPT cuts it, and trained on for `--minutes`: by
train.py without other options, by the quickstart's recipe, and by nanoGPT's for a CPU (by character, its best checkpoint).
"""

import math
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import common, nanogpt

COLUMNS = ("ours", "one recipe", "nanoGPT", "trigram", "unigram", "uniform")


def cut(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first 90% of the characters of each file to one folder, and the rest to another."""
    parts = folder / "train", folder / "val"
    for file in sorted(text.iterdir()) if text.is_dir() else [text]:
        characters = file.read_text(encoding="utf-8")
        end = int(0.9 * len(characters))
        for part, piece in zip(parts, (characters[:end], characters[end:]), strict=True):
            part.mkdir(exist_ok=True)
            (part / file.name).write_text(piece, encoding="utf-8")
    return parts


def train_ours(parts: tuple[Path, Path], minutes: float, *recipe: str) -> tuple[dict[str, float], float]:
    """Bits per byte by row of the last table, `this model` among them, and seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--data.source={parts[0]}", f"--data.val={parts[1]}", f"--train.minutes={minutes:g}"]
        result = common.run_command([sys.executable, "train.py", *recipe, *options, f"--run.dir={folder}/run"])
    print(result.output, file=sys.stderr)
    rows = re.findall(r"^  (this model|trigram|unigram|uniform) .* (\d+\.\d+) +\d+\.\d+$", result.output, re.M)
    n_tokens = int(re.findall(r"([\d,]+) held out", result.output)[0].replace(",", "")) - 1
    bits = n_tokens / math.log(2) / sum(file.stat().st_size for file in parts[1].iterdir())  # line breaks included
    return {name: bits * float(nats) for name, nats in rows}, result.seconds


def train_nanogpt(clone: Path, parts: tuple[Path, Path], minutes: float) -> tuple[float, float]:
    """Bits per byte of its best checkpoint, and seconds of its train.py; the number of steps is that of the time."""
    train, val = ("".join(file.read_text(encoding="utf-8") for file in sorted(part.iterdir())) for part in parts)
    with nanogpt.copied(clone, train + val) as folder:
        probe = nanogpt.train(folder, "--max_iters=200", "--eval_iters=1")
        step = (probe.seconds_until("iter 200:") - probe.seconds_until("iter 100:")) / 100
        evaluation = 40 / 3 * step  # forward passes on both splits
        steps = int((60 * minutes - probe.seconds_until("iter 0:") - evaluation) / (step + evaluation / 250))
        result = nanogpt.train(folder, f"--max_iters={steps}", f"--lr_decay_iters={steps}")
        loss = nanogpt.whole_split_loss(folder)
    return loss / math.log(2) * len(val) / len(val.encode()), result.seconds


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
                fixed, fixed_seconds = train_ours(parts, args.minutes, "configs/quickstart.toml")
                theirs = train_nanogpt(args.nanogpt, parts, args.minutes) if args.nanogpt else (math.nan, 0)
                n_bytes = sum(file.stat().st_size for part in parts for file in part.iterdir())
            bits = [ours.pop("this model"), fixed["this model"], theirs[0], *(ours[name] for name in COLUMNS[3:])]
            times = f"{seconds:.0f}, {fixed_seconds:.0f}, {theirs[1]:.0f}"
            rows.append((text.name, f"{n_bytes / 1e3:,.0f}", *(f"{b:.3f}" for b in bits), times))
            print(*rows[-1], file=sys.stderr, flush=True)
        out.add(f"Held-out bits per byte after {args.minutes:g} minutes each.")
        out.add(common.table(("text", "kB", *COLUMNS, "seconds of the three"), rows))


if __name__ == "__main__":
    main()
