"""Train a small GPT:            python train.py [CONFIG.toml or TEXT] [--section.key value ...]
Print what a run would need:  python train.py [CONFIG.toml] --plan [8xh100]

Parse the config, prepare the corpus, build the trainer and its callbacks, run it. torch is imported only once the command
line is known to be valid.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if sys.flags.safe_path:  # python -P, python -I
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import quote_arg, run_main
from training.config import RunConfig, given_options, name_source, parse_train, replace_options
from training.hardware import parse_plan_option
from training.recipe import describe, read_recipe
from training.run_dir import open_run_dir

if TYPE_CHECKING:
    from data.prepare import TokenizedCorpus
    from inspection.eval_texts import EvalTexts

CONTRAST_STORIES = 200


def main(argv: list[str], callbacks: Sequence[object] = ()) -> str:
    """Run the command, with further callbacks; returns the run folder, "" for a plan."""
    started = time.perf_counter()
    argv, target = parse_plan_option(argv)
    usage = (__doc__ or "").partition("\n\n")[0].replace("\n", "\n\n")
    options = name_source(argv)
    config, name = parse_train(options, usage)
    defaults, max_epochs, size = read_recipe(config, options)
    if config.model.init and not config.run.resume:
        from training.pretrained import describe_init, init_options

        n_files = int(bool(options) and not options[0].startswith("-"))
        options[n_files:n_files] = init_options(config, options[n_files:])
    if defaults or config.model.init:
        config, name = parse_train([*defaults, *options])
    from data import corpora, text_files, tokenizer

    if config.run.resume and os.sep in config.data.tokenizer and not os.path.exists(config.data.tokenizer):
        config = replace_options(config, {"data.tokenizer": config.run.resume})  # the run has it as well
    tokenizer.check_tokenizer_name(config.data.tokenizer)  # mistakes are reported before torch is loaded
    source, is_main_process = config.data.source, os.environ.get("RANK", "0") == "0"
    if source in corpora.NAMED and os.path.exists(source) and is_main_process:
        print(f"{source} is a built-in corpus; for your own text of that name: --data.source ./{source}", flush=True)
    if target is not None:
        from training.plan import plan

        plan(config, target, name)
        return ""
    for text in {source, config.data.val} - {"", *corpora.NAMED}:
        text_files.find_files(text, config.data.encoding)
    if defaults and is_main_process:
        print(describe(config, max_epochs, size), flush=True)
    if config.model.init and not config.run.resume and is_main_process:
        print(describe_init(config), flush=True)
    with open_run_dir(config, name) as config:
        from training.distributed import process_group

        with process_group(config.run.dist_timeout, config.run.device):
            return train(config, started, given_options(options), max_epochs, callbacks)


def train(config: RunConfig, started: float, given: set[str], max_epochs: float, more: Sequence[object]) -> str:
    """One run, from text to a report of the loss and of the attention heads; returns its folder.

    `given` and `max_epochs`: of `search`; `more`: callbacks.
    """
    from data.prepare import check_min_length
    from training.device import get_dist_context
    from training.distributed import prepare_once
    from training.metrics import print_line
    from training.setup import Checkpointer, broadcast_config, build_trainer, get_callbacks, print_header

    ctx = get_dist_context(config.train.dtype, config.run.threads, config.run.device)
    config = broadcast_config(config, ctx)
    data = prepare_once(config.data, ctx)
    callbacks: list[object] = []
    if config.train.minutes:
        from training.time_budget import search

        elapsed = time.perf_counter() - started if "train.minutes" in given else 0.0  # the default is without preparing
        config, deadline = search(config, ctx, data, elapsed, given, max_epochs)
        callbacks.append(deadline)
    check_min_length(data, config.model.context)
    recorder = None
    if config.log.attention == "on":
        from inspection.recorder import AttentionRecorder

        eval_texts = build_eval_texts(data, config)
        recorder = AttentionRecorder(eval_texts, data.tokenizer.token_bytes, Path(config.run.dir), print_line)
    checkpointer = Checkpointer(config, ctx)  # before the newest checkpoint is opened: it cleans up after a kill
    trainer = build_trainer(config, ctx, data)
    trainer.callbacks = [*callbacks, *more, *get_callbacks(trainer, checkpointer, recorder)]
    print_header(trainer)
    trainer.run()
    if ctx.is_main_process:
        run, html = quote_arg(config.run.dir), Path(config.run.dir) / "attention.html"
        page = f"  open {quote_arg(html)}\n" if recorder and html.is_file() else ""
        summary = f"  python attend.py summary {run}\n" if recorder else ""
        seconds = time.perf_counter() - started
        step, last = trainer.state.step, trainer.saved[0] if trainer.saved else 0
        which = f"   # the best checkpoint, of step {step}; --checkpoint last: step {last}" if step != last else ""
        print_line(
            f"\n{seconds:.0f} s in all; the run is in {config.run.dir}\n{page}{summary}  python sample.py {run}{which}"
        )
    return config.run.dir


def build_eval_texts(data: TokenizedCorpus, config: RunConfig) -> EvalTexts:
    """The texts to record and measure: held-out ones, repeated random tokens, contrast pairs, the user's prompts."""
    import numpy as np

    from data.stories import KINDS, stories
    from inspection import eval_texts as build
    from inspection.contrast_pairs import make_contrast_pair

    tokenizer, context = data.tokenizer, config.model.context
    pairs = [
        make_contrast_pair(tokenizer, label.kind, story.text, label.answer, label.antecedents, label.wrong, label.nouns)
        for story in (stories("val", CONTRAST_STORIES) if data.name == "stories" else ())
        for label in story.labels
    ]
    used = np.unique(data.train.tokens[:200_000]).tolist()
    texts: list[tuple[str, tuple[int, ...]]] = []
    saved = Path(config.run.dir) / "attention" / "eval_texts.json"
    if config.log.prompts and not (config.run.resume and saved.is_file()):
        has_backslashes = any(b"\\" in tokenizer.token_bytes(token) for token in used)
        texts, own = build.read_user_prompts(Path(config.log.prompts), tokenizer, context, has_backslashes)
        pairs += own
    length = build.max_text_length(config.model, len(texts) + build.RECORDED_HELD_OUT + len(KINDS) + 2)
    texts = [(name, tokens[:length]) for name, tokens in texts]
    texts += build.held_out_texts(data.val.tokens, data.val.document_starts, length)
    repeats = build.repeated_sequences(used, tokenizer.end_of_text, length, config.run.seed)
    return build.EvalTexts(tuple(texts), repeats, tuple(pair for pair in pairs if pair.length <= context))


if __name__ == "__main__":
    run_main(main)
