"""How fast a large corpus is prepared, beside a plain tiktoken loop, and how much memory each process needs for it.

    python -m benchmarks.prepare                        # 1 GB, the gpt2 encoding where it is at hand
    python -m benchmarks.prepare --gigabytes 4 --tokenizer bpe --workers 8

Writes the text and the tokens to a temporary folder (about twice the text's size on disk). Each contestant works in a
process of its own, watched with its workers; the clock runs from before its encoding is loaded until its tokens
are on disk. The peer reads a document, encodes it with `encode_ordinary`, appends it to a file as uint16, and so on,
in one process. Ours also hashes the text, splits it, checks, and writes what `train.py` verifies.

The text is made of random words with Zipf's frequencies, some punctuation, and documents of 20 to 2,000 words.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.results import Page, page
from benchmarks.side_by_side import Target, alternate, options, targets
from benchmarks.side_by_side import table as markdown
from data.prepare import available_cores

BLOCK_WORDS = 1_000_000
SEPARATOR = "<|endoftext|>\n"


def write_text(path: Path, n_bytes: int) -> None:
    """Write about `n_bytes` of text whose words come with Zipf's frequencies."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1 / np.arange(2, 28)
    lengths = rng.integers(2, 10, 60_000)
    drawn = iter(rng.choice(letters, lengths.sum(), p=weights / weights.sum()).tolist())
    words = ["".join(next(drawn) for _ in range(length)) for length in lengths]
    words[10::200] = [f"{word}," for word in words[10::200]]
    words[11::200] = [f"{word}." for word in words[11::200]]
    words[500::501] = [f"{word}é" for word in words[500::501]]
    frequencies = 1 / np.arange(1, len(words) + 1)
    cumulative = np.cumsum(frequencies / frequencies.sum())
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < n_bytes:
            ranks = np.minimum(np.searchsorted(cumulative, rng.random(BLOCK_WORDS)), len(words) - 1)
            chosen = [words[rank] for rank in ranks.tolist()]
            at = 0
            while at < len(chosen):
                end = at + int(rng.integers(20, 2_000))
                written += file.write(" ".join(chosen[at:end]) + f"\n{SEPARATOR}")
                at = end


def ours(source: str, tokenizer: str, vocab_size: int, workers: int, cache: str, told: str) -> None:
    """Prepare, twice, and tell what it took. Runs in a process of its own."""
    from data.config import DataConfig
    from data.prepare import prepare

    os.environ["GLASSGPT_CACHE"] = cache
    config = DataConfig(source=source, tokenizer=tokenizer, vocab_size=vocab_size, workers=workers)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        made = prepare(config, progress=True)
        seconds.append(time.perf_counter() - began)
    tokens = len(made.train) + len(made.val)
    described = {"seconds": seconds[0], "again": seconds[1], "tokens": tokens, "saved": str(made.folder)}
    Path(told).write_text(json.dumps(described))


def plain(source: str, encoding: str, out: str, told: str) -> None:
    """The peer. Runs in a process of its own.

    Args:
        encoding: a name of tiktoken's, or the file of one of our trained tokenizers, which is tiktoken's as well.
    """
    began = time.perf_counter()
    if encoding.endswith(".json"):
        from data.tokenizer import load_tokenizer

        loaded = load_tokenizer(Path(encoding))
        encode, end = loaded._encoding.encode_ordinary, loaded.end_of_text  # type: ignore[attr-defined]
    else:
        import tiktoken

        library = tiktoken.get_encoding(encoding)
        encode, end = library.encode_ordinary, library.eot_token
    dtype, tokens = np.uint16 if end < 1 << 16 else np.uint32, 0
    with open(source, encoding="utf-8", newline="") as text, open(out, "wb") as file:
        lines: list[str] = []
        for line in text:
            if line != SEPARATOR:
                lines.append(line)
                continue
            ids = encode("".join(lines).removesuffix("\n"))
            ids.append(end)
            np.array(ids, dtype).tofile(file)
            tokens += len(ids)
            lines.clear()
    Path(told).write_text(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}))


def processes_below(root: int) -> list[int]:
    """`root` and its descendants, from /proc."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory_of(process: int) -> tuple[float, float]:
    """Peak resident memory, and resident memory now without pages of mapped files; megabytes."""
    with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) / 1e3, int(fields["RssAnon"].split()[0]) / 1e3


def watch(process: BaseProcess) -> tuple[dict[int, float], dict[int, float]]:
    """Until the process ends: peak memory of it and each descendant, with and without mapped files;
    megabytes.
    """
    resident: dict[int, float] = {}
    anonymous: dict[int, float] = {}
    assert process.pid is not None
    while process.is_alive():
        for pid in processes_below(process.pid):
            try:
                peak, now = memory_of(pid)
            except (OSError, KeyError):
                continue
            resident[pid] = max(peak, resident.get(pid, 0.0))
            anonymous[pid] = max(now, anonymous.get(pid, 0.0))
        process.join(0.1)
    return resident, anonymous


@dataclass(frozen=True)
class Measured:
    """What one contestant took."""

    seconds: float
    told: dict[str, object]
    processes: int
    largest: float
    """Megabytes at the peak of the largest process: resident, and without the pages of mapped files."""
    largest_own: float
    together: float


def measured(work: Callable[..., None], *arguments: object) -> Measured:
    """Run `work` in a process of its own, watch it, and read what it tells."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        process = multiprocessing.get_context("spawn").Process(target=work, args=(*arguments, str(told)))
        process.start()
        resident, own = watch(process)
        if process.exitcode:
            raise SystemExit("preparing failed")
        answer = json.loads(told.read_text())
    counted = (len(resident), max(resident.values()), max(own.values()), sum(own.values()))
    return Measured(answer["seconds"], answer, *counted)


def gpt2_is_there() -> bool:
    """Whether tiktoken's cache holds the gpt2 encoding, so that no network is needed."""
    names = ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    return all((folder / name).is_file() for name in names)


def run(folder: Path, gigabytes: float, tokenizer: str, vocab_size: int, workers: int, rounds: int, say: Page) -> None:
    """Make the text, let everybody at it in turn, and say what came out."""
    source, small = folder / "text.txt", folder / "small.txt"
    for path, size in ((source, gigabytes), (small, gigabytes / 4)):
        write_text(path, int(size * 1e9))
    # Long ago as far as the cache can tell, which looks twice at what was changed just now.
    time.sleep(2.5)
    cache = str(folder / "cache")

    def prepared(path: Path, workers: int) -> Measured:
        shutil.rmtree(cache, ignore_errors=True)
        return measured(ours, str(path), tokenizer, vocab_size, workers, cache)

    few = prepared(small, workers)
    encoding = tokenizer
    if tokenizer in ("bpe", "char", "byte"):
        encoding = str(shutil.copy(Path(str(few.told["saved"])) / "tokenizer.json", folder))
    contestants: dict[str, Callable[[], Measured]] = {
        f"ours, {workers} workers": lambda: prepared(source, workers),
        "ours, alone": lambda: prepared(source, 1),
        "plain loop": lambda: measured(plain, str(source), encoding, str(folder / "plain.bin")),
    }
    found = alternate(contestants, rounds)
    tell(found, few, source.stat().st_size / 1e6, workers, say)


def tell(found: dict[str, list[Measured]], few: Measured, megabytes: float, workers: int, say: Page) -> None:
    """The table of speed and memory, and the targets."""
    cores = {name: workers if name.endswith("workers") else 1 for name in found}
    speed = {name: megabytes / median(one.seconds for one in all_of) / cores[name] for name, all_of in found.items()}
    many, alone, peer = found
    rows = [
        (
            name,
            f"{found[name][0].told['tokens']:,}",
            f"{speed[name] * cores[name]:.1f}",
            f"{speed[name]:.1f}",
            f"{speed[name] / speed[peer]:.2f} x",
            f"{max(one.largest for one in found[name]):.0f}",
            f"{max(one.together for one in found[name]):.0f}",
        )
        for name in found
    ]
    head = ("", "tokens", "MB/s", "per core", "of the loop's", "MB, largest process", "MB, all of their own")
    say.say(markdown(head, rows))
    again = median(float(str(one.told["again"])) for one in found[many])
    say.say(f"A second start, which finds the tokens and verifies them, took {again * 1e3:.0f} ms.")
    growth = max(one.largest_own for one in found[many]) / few.largest_own
    say.say(
        targets(
            [
                Target("speed per core, all workers, of the plain loop's", speed[many] / speed[peer], 0.9),
                Target("speed alone, of the plain loop's", speed[alone] / speed[peer], 0.9),
                Target("memory of a process, of that for a quarter of the text", growth, 1.1, at_most=True),
            ]
        )
    )


def main() -> None:
    parser = options(__doc__ or "", rounds=1)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenizer", help="gpt2 if tiktoken's cache has it, else bpe")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of a bpe")
    parser.add_argument("--workers", type=int, default=available_cores(), help="one for each core")
    asked = parser.parse_args()
    tokenizer = asked.tokenizer or ("gpt2" if gpt2_is_there() else "bpe")
    with page("prepare", asked.record) as say, tempfile.TemporaryDirectory() as name:
        if not asked.tokenizer and tokenizer == "bpe":
            print("tiktoken's cache has no gpt2 encoding, so a bpe is trained (TIKTOKEN_CACHE_DIR)", file=sys.stderr)
        say.say(f"{asked.gigabytes:g} GB of text, tokenizer {tokenizer}; medians of {asked.rounds} rounds, in turn.")
        run(Path(name), asked.gigabytes, tokenizer, asked.vocab_size, asked.workers, asked.rounds, say)


if __name__ == "__main__":
    main()
