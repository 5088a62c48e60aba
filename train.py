"""Train a small GPT:  python train.py [CONFIG.toml] [--section.key value ...]

config → corpus → model → the loop. Nothing heavy is imported before the command line has been found good.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runtime.config import RunConfig, parse_train
from runtime.errors import run_main

if TYPE_CHECKING:
    from data.prepare import Prepared
    from inspection.probes import Probe

PROBE_STORIES = 200
WATCHED_TEXTS = 4


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    config, name = parse_train(argv)
    from runtime.device import processes

    with processes():
        train(config, name, started)


def train(config: RunConfig, name: str, started: float) -> None:
    """One run, from text to what the model learned of it."""
    from data.prepare import prepare, require
    from inspection.observer import Observer
    from runtime.checkpoint import TrainState
    from runtime.device import find_machine
    from runtime.provenance import provenance
    from runtime.run import Run

    machine = find_machine(config.train.dtype, config.run.threads)
    data = prepare(config.data, progress=machine.is_first)
    require(data, config.model.context)
    run = Run(config, name, machine, data)
    texts = watched_texts(data, config.model.context)
    observer = Observer(run.model, texts, probes(data), data.tokenizer.token_bytes, run.folder / "attention")

    def observe(state: TrainState) -> None:
        observer.write(state.step, provenance(run.model, data.tokenizer, state))

    run.introduce()
    run.train(observe)
    run.report()
    if machine.is_first:
        run.finish(*observer.report(run.folder), started)


def watched_texts(data: Prepared, context: int) -> list[tuple[str, list[int]]]:
    """The beginnings of the first validation documents, (name, tokens) of at most a context each."""
    val = data.val
    starts = val.document_starts[:WATCHED_TEXTS].tolist()
    ends = [*val.document_starts[1 : len(starts)].tolist(), len(val)][: len(starts)]
    spans = zip(starts, ends, strict=True)
    return [(f"held-out text {k}", val.read(a, min(b, a + context)).tolist()) for k, (a, b) in enumerate(spans, 1)]


def probes(data: Prepared) -> list[Probe]:
    """Questions about held-out stories whose answers are known; none for other corpora."""
    from data.stories import stories
    from inspection.probes import locate

    if data.name != "stories":
        return []
    tokenizer, found = data.tokenizer, []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    for story in stories("val", PROBE_STORIES):
        for label in story.labels:
            spans = (label.answer, label.evidence, label.wrong)
            found.append(locate(label.kind, story.text, *spans, encode, tokenizer.token_bytes, tokenizer.end_of_text))
    return found


if __name__ == "__main__":
    run_main(main)
