"""How fast a large corpus is prepared, and how much memory each process needs for it.

    python -m benchmarks.prepare                        # 1 GB, bpe with 8,192 tokens
    python -m benchmarks.prepare --gigabytes 4 --tokenizer gpt2 --workers 8

Writes the text and the tokens to a temporary folder (about twice the text's size on disk), prepares it in a
process of its own, watches that process and its workers, and prints speed, processes and peak memory. The
text is made of random words with Zipf's frequencies, some punctuation, and documents of 20 to 2,000 words.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

BLOCK_WORDS = 1_000_000


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
                written += file.write(" ".join(chosen[at:end]) + "\n<|endoftext|>\n")
                at = end


def prepare_and_tell(source: str, tokenizer: str, vocab_size: int, workers: int, told: Path) -> None:
    """Runs in a process of its own, so that making the text does not count."""
    from data.config import DataConfig
    from data.prepare import prepare

    config = DataConfig(source=source, tokenizer=tokenizer, vocab_size=vocab_size, workers=workers)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        made = prepare(config, progress=True)
        seconds.append(time.perf_counter() - began)
    tokens = len(made.train) + len(made.val)
    documents = made.train.n_documents + made.val.n_documents
    told.write_text(f"{seconds[0]} {seconds[1]} {tokens} {documents} {made.tokenizer.vocab_size}")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GLASSGPT_CACHE"] = str(folder / "cache")
        source, told = folder / "text.txt", folder / "told"
        began = time.perf_counter()
        write_text(source, int(options.gigabytes * 1e9))
        megabytes = source.stat().st_size / 1e6
        print(f"made {megabytes:,.0f} MB of text in {time.perf_counter() - began:.0f} s")
        # Long ago as far as the cache can tell, which looks twice at what was changed just now.
        time.sleep(2.5)
        process = multiprocessing.get_context("spawn").Process(
            target=prepare_and_tell,
            args=(str(source), options.tokenizer, options.vocab_size, options.workers, told),
        )
        process.start()
        resident, anonymous = watch(process)
        if process.exitcode:
            raise SystemExit("preparing failed")
        first, second, tokens, documents, vocab_size = (float(word) for word in told.read_text().split())
    print(f"{options.tokenizer}, {vocab_size:,.0f} tokens in the vocabulary")
    print(f"{tokens:,.0f} tokens in {documents:,.0f} documents")
    print(f"first run {first:.1f} s: {megabytes / first:.1f} MB/s; second run {second * 1e3:.0f} ms")
    print(f"{len(resident)} processes, the largest {max(resident.values()):.0f} MB resident at its peak")
    for pid, peak in resident.items():
        print(f"  process {pid}: peak {peak:.0f} MB resident, {anonymous[pid]:.0f} MB its own")


if __name__ == "__main__":
    main()
