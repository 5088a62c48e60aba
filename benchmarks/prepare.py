"""Preparing a large corpus next to a plain tiktoken loop: speed per core, and peak memory.

    python -m benchmarks.prepare                        # 1 GB with the gpt2 encoding (tiktoken fetches it once)
    python -m benchmarks.prepare --gigabytes 4 --tokenizer cl100k_base --workers 8

The text consists of random words with Zipf's frequencies in documents of 20 to 2,000 words. The loop reads a document,
encodes it and appends it to a file, in one process; ours also hashes, splits and verifies. Each contestant is a command
whose clock includes its start. It takes about twice the text's size on disk.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import ROOT, TARGET_HEAD, CommandResult, interleave, parser, report, run_command, table, target

SEPARATOR = "<|endoftext|>\n"
OURS = """
import os, sys
from data.config import DataConfig
from data.prepare import prepare
source, tokenizer, workers, os.environ["GLASSGPT_CACHE"] = sys.argv[1:]
if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(workers)])
    corpus = prepare(DataConfig(source=source, tokenizer=tokenizer), progress=False)
    print(len(corpus.train) + len(corpus.val))
"""
LOOP = """
import sys
import numpy as np, tiktoken
source, name, out = sys.argv[1:]
encoding, tokens = tiktoken.get_encoding(name), 0
dtype = np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32
with open(source, encoding="utf-8", newline="") as text, open(out, "wb") as file:
    lines = []
    for line in text:
        if line != "<|endoftext|>\\n":
            lines.append(line)
            continue
        ids = [*encoding.encode_ordinary("".join(lines).removesuffix("\\n")), encoding.eot_token]
        np.array(ids, dtype).tofile(file)
        tokens += len(ids)
        lines.clear()
print(tokens)
"""


def write_text(path: Path, n_bytes: int) -> None:
    """Write about `n_bytes` of random words."""
    rng, letters = np.random.default_rng(0), np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    probabilities = 1 / np.arange(2, 28)
    probabilities /= probabilities.sum()
    words = ["".join(rng.choice(letters, length, p=probabilities)) for length in rng.integers(2, 10, 20_000)]
    words[10::200] = [f"{word}," for word in words[10::200]]
    words[500::501] = [f"{word}é" for word in words[500::501]]
    frequencies = np.cumsum(1 / np.arange(1, len(words) + 1))
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < n_bytes:
            ranks = np.searchsorted(frequencies, frequencies[-1] * rng.random(int(rng.integers(20, 2_000))))
            written += file.write(" ".join(words[rank] for rank in ranks) + f"\n{SEPARATOR}")


def main() -> None:
    import os

    options = parser(__doc__, rounds=1)
    options.add_argument("--gigabytes", type=float, default=1.0)
    options.add_argument("--tokenizer", default="gpt2", help="an encoding of tiktoken")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one for each core")
    args = options.parse_args()
    with report("prepare", args.record) as out, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        write_text(text, int(args.gigabytes * 1e9))
        (folder / "ours.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{OURS}")  # workers import it

        def ours(workers: int) -> CommandResult:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                words = [str(folder / "ours.py"), str(text), args.tokenizer, str(workers), cache]
                return run_command([sys.executable, *words])

        loop = [sys.executable, "-c", LOOP, str(text), args.tokenizer, str(folder / "loop.bin")]
        contestants: dict[str, Callable[[], CommandResult]] = {
            f"ours, {args.workers} workers": partial(ours, args.workers),
            "ours, alone": partial(ours, 1),
            "plain loop": partial(run_command, loop),
        }
        results = interleave(contestants, args.rounds)
        cores = dict(zip(results, (args.workers, 1, 1), strict=True))
        speed = {who: text.stat().st_size / 1e6 / median(r.seconds for r in all_of) for who, all_of in results.items()}
        share = {who: speed[who] / cores[who] / speed["plain loop"] for who in results}
        memory = {who: max(result.megabytes for result in all_of) for who, all_of in results.items()}
        rows = [
            (who, f"{int(results[who][0].output):,}", f"{speed[who]:.1f}", f"{share[who]:.2f} x", f"{memory[who]:.0f}")
            for who in results
        ]
        out.add(f"{args.gigabytes:g} GB of text, {args.tokenizer}; medians of {args.rounds} interleaved rounds.")
        out.add(table(("", "tokens", "MB/s", "per core, of the loop's", "MB, largest process"), rows))
        many, alone, _ = results
        targets = [target(f"speed per core of {who}, of the loop's", share[who], 0.9) for who in (many, alone)]
        out.add(table(TARGET_HEAD, targets))


if __name__ == "__main__":
    main()
