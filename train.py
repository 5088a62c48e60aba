"""Train a small GPT:  python train.py [CONFIG.toml] [--section.key value ...]
Prove that a run resumes exactly:  python train.py --run.resume RUN --check
Say what a run would take:         python train.py [CONFIG.toml] --plan [8xh100]

config → corpus → model → the loop. Nothing heavy is imported before the command line has been found good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import run_main
from training.config import RunConfig, parse_train
from training.hardware import parse_plan_option
from training.run_dir import open_run_dir

if TYPE_CHECKING:
    from data.prepare import TokenizedCorpus
    from inspection.contrast_pairs import ContrastPair
    from inspection.eval_texts import EvalTexts
    from training.device import DistContext

CHECK = "--check"
PROBE_STORIES = 200
HELD_OUT_TEXTS = 12


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    argv, place = parse_plan_option(argv)
    config, name = parse_train([word for word in argv if word != CHECK])
    if CHECK in argv:
        from training.resume_check import check_resume

        check_resume(config)
        return
    if place is not None:
        from training.plan import plan

        plan(config, place, name)
        return
    with open_run_dir(config, name) as config:
        from training.distributed import process_group

        with process_group(config.run.dist_timeout):
            train(config, started)


def train(config: RunConfig, started: float) -> None:
    """One run, from text to what the model learned of it."""
    from data.prepare import require
    from inspection.recorder import AttentionRecorder
    from training.checkpoint import TrainState, sha256_of_weights
    from training.device import get_dist_context
    from training.preparing import prepare_once
    from training.provenance import provenance
    from training.setup import Run, agreed

    ctx = get_dist_context(config.train.dtype, config.run.threads)
    config = agreed(config, ctx)
    data = prepare_once(config.data, ctx)
    config, end = planned(config, ctx, data, started)
    require(data, config.model.context)
    watched = watch_set(data, config)
    run = Run(config, ctx, data)
    observer = AttentionRecorder(run.model, watched, data.tokenizer.token_bytes, run.folder)

    def observe(state: TrainState) -> None:
        observer.write(state.step, provenance(run.model, data.tokenizer, state), run.sample)

    run.begin()
    if ctx.is_main_process:
        observer.begin(run.state.step)
        if not observer.has(run.state.step):  # untrained heads, or those of a run that was stopped
            observe(run.state)
    run.train(observe, end)
    run.report()
    if ctx.is_main_process:
        seen = observer.report(run.state.step, sha256_of_weights(run.model))
        run.finish(seen.lines, seen.pictures, seen.page, started)


def planned(
    config: RunConfig, ctx: DistContext, data: TokenizedCorpus, started: float
) -> tuple[RunConfig, float | None]:
    """The config with model, batch and steps chosen, where it gives the minutes to spend; when they should be over."""
    if not config.train.minutes:
        return config, None
    from training.time_budget import choose

    sizes = (data.tokenizer.vocab_size, len(data.train), len(data.val))
    config, lines, end = choose(config, ctx, *sizes, time.perf_counter() - started)
    print("\n".join(lines), flush=True)
    return config, end


def watch_set(data: TokenizedCorpus, config: RunConfig) -> EvalTexts:
    """What is looked at throughout the run: held-out texts, repeats of random tokens, questions, the user's lines."""
    import numpy as np

    from data.stories import KINDS
    from inspection.eval_texts import SHOWN, EvalTexts, repeated, watched_length
    from inspection.user_prompts import user_prompts

    tokenizer, model = data.tokenizer, config.model
    texts: list[tuple[str, tuple[int, ...]]] = []
    questions = probes(data)
    if config.log.prompts:
        encode = encoder(data)
        file = Path(config.log.prompts)
        texts, own = user_prompts(file, encode, tokenizer.token_bytes, tokenizer.end_of_text, model.context)
        questions += own
    length = watched_length(model, len(texts) + SHOWN + len(KINDS) + 2)
    texts = [(name, tokens[:length]) for name, tokens in texts] + held_out_texts(data, length)
    used = np.unique(data.train.read(0, min(len(data.train), 200_000))).tolist()
    repeats = repeated(used, tokenizer.end_of_text, length, config.run.seed)
    return EvalTexts(tuple(texts), repeats, tuple(p for p in questions if p.length <= model.context))


def held_out_texts(data: TokenizedCorpus, length: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, tokens), at most `length` each, of the first validation documents, or of pieces where these are few."""
    from inspection.eval_texts import HELD_OUT

    val = data.val
    bounds = [*val.document_starts[:HELD_OUT_TEXTS].tolist(), len(val)]
    if val.n_documents > HELD_OUT_TEXTS:
        bounds[-1] = int(val.document_starts[HELD_OUT_TEXTS])
    apart = max(length, (bounds[-1] - bounds[0]) // HELD_OUT_TEXTS)
    pieces = [(start, min(start + length, end)) for a, end in pairwise(bounds) for start in range(a, end, apart)]
    texts = [tuple(val.read(start, end).tolist()) for start, end in pieces[:HELD_OUT_TEXTS] if end - start > 1]
    return [(f"{HELD_OUT} {k}", tokens) for k, tokens in enumerate(texts, 1)]


def encoder(data: TokenizedCorpus) -> Callable[[str], list[int]]:
    """A text's tokens as a list."""
    return lambda text: data.tokenizer.encode(text).tolist()


def probes(data: TokenizedCorpus) -> list[ContrastPair]:
    """Questions about held-out stories whose answers are known; none for other corpora."""
    from data.stories import stories
    from inspection.contrast_pairs import locate

    if data.name != "stories":
        return []
    tokenizer, encode = data.tokenizer, encoder(data)
    found = []
    for story in stories("val", PROBE_STORIES):
        for label in story.labels:
            about = (label.kind, story.text, label.answer, label.evidence, label.wrong)
            found.append(locate(*about, encode, tokenizer.token_bytes, tokenizer.end_of_text, label.nouns))
    return found


if __name__ == "__main__":
    run_main(main)
