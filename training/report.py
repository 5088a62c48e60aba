"""The end of a run: the losses of its best step, compared with baselines, and what could be better."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError, escape_control_chars
from common.figures import ACCENT, MUTED, figure, report_failure
from common.files import read_metrics
from data.dataloader import eval_indices
from data.ngram_baseline import baselines, bits_per_byte
from data.prepare import TokenizedCorpus
from training.checkpoint import read_checkpoint
from training.config import RunConfig
from training.distributed import gather_weights, is_fsdp
from training.metrics import print_line
from training.text_generation import encode_prompt, generate_tokens
from training.trainer import Callback, Trainer, derive_seed

DESCRIPTIONS = {
    "uniform": "every token equally likely",
    "unigram": "token frequencies",
    "trigram": "the two tokens before it",
    "floor": "entropy of the corpus: the lowest possible loss",
}
RISE = 0.02  # nats/token of the held-out loss after its best, that are worth a line
FAR_BELOW = 0.75  # training loss / held-out loss
TRAIN_TARGETS = 20_000  # training targets whose loss is compared with the held-out loss
COPY_TEXTS, COPY_TOKENS = 4, 100  # number and length of the sampled texts that are searched for in the training text
COPY_LIMIT = 5_000_000  # training tokens that are searched, from the start of the split


class Losses(NamedTuple):
    """Mean losses of the model of one step, in nats/token: on held-out targets and on `TRAIN_TARGETS` of training."""

    step: int
    val: float
    num_targets: int
    train: float
    epochs: float  # times that the training text was read


class LossReport(Callback):
    """At the end of training: losses, baselines and what to try, as lines and a plot.

    If the best evaluation is not the last one, its weights and state replace those of the trainer: all that is measured
    afterwards is of that step.
    """

    def on_end(self, trainer: Trainer) -> None:
        """Every process takes part."""
        config, state = trainer.config, trainer.state
        last = measure(trainer)
        model = measure(trainer) if load_best(trainer) else last
        gather_weights(trainer.wrapped_model, trainer.model)
        if not trainer.ctx.is_main_process:
            return
        data = trainer.data
        references = baseline_losses(data)
        trainer.final_metrics = {"final_val_loss": model.val, "final_train_loss": model.train, **references}
        if state.step < config.train.steps:
            waited = f"no improvement for {state.evals_without_improvement} evaluations"
            print_line(f"stopped at step {state.step}: {waited} (--train.patience 0 trains on)")
        print_line("\n" + table(model, last, references, data))
        for line in advice(model, last, references, config, longest_copies(trainer)):
            print_line(line)
        folder = Path(config.run.dir)
        title = escape_control_chars(f"{data.name}: {folder}")
        with report_failure(folder / "loss.png"):
            plot_loss(folder / "loss.png", read_metrics(folder / "metrics.jsonl"), references, title)


def measure(trainer: Trainer) -> Losses:
    """The losses of the present weights; every process takes part."""
    val, num_targets = trainer.validation_loss(trainer.final_subset)
    subset = eval_indices(trainer.train_sequences, TRAIN_TARGETS)
    train, _ = trainer.validation_loss(subset, split="train")
    return Losses(trainer.state.step, val, num_targets, train, trainer.state.tokens_seen / len(trainer.data.train))


def load_best(trainer: Trainer) -> bool:
    """Load weights and state of the best evaluation unless it is the last one; returns whether they were loaded.

    Every process reads them. If one cannot, or the weights are sharded, all keep the last ones, and a line says so.
    """
    state, weights = trainer.state, None
    if state.best_loss is None or state.best_step == state.last_eval_step:
        return False
    with suppress(UserError):
        if not is_fsdp(trainer.wrapped_model):
            saved = read_checkpoint(Path(trainer.config.run.dir) / "checkpoints" / f"{state.best_step:06d}")
            weights = saved.build_model(trainer.model.config).state_dict()
    if trainer.ctx.all_reduce_max(weights is None):
        if trainer.ctx.is_main_process:
            print_line(f"the report is of the last step: the best, {state.best_step}, is sharded or cannot be read")
        return False
    assert weights is not None
    trainer.model.load_state_dict(weights)
    trainer.state, trainer.sample_tokens = saved.state, None
    return True


def baseline_losses(data: TokenizedCorpus) -> dict[str, float]:
    """Losses in nats/token to compare the model's with; `floor` where the entropy of the corpus is known."""
    losses = dict(baselines(data.train, data.val, data.tokenizer.vocab_size))
    if data.nats_per_document is not None:  # every token after the first is a target once, also end-of-text
        losses["floor"] = data.nats_per_document * data.val.n_documents / (len(data.val) - 1)
    return losses


def table(model: Losses, last: Losses, references: Mapping[str, float], data: TokenizedCorpus) -> str:
    """The model's losses and the baselines, highest first, in nats/token and bits/byte."""
    rows = [(name, DESCRIPTIONS[name], nats, data.val) for name, nats in references.items()]
    rows.append(("this model", "best, at " * (model is not last) + f"step {model.step}", model.val, data.val))
    rows.append(("training", "this model on its training text", model.train, data.train))
    if model is not last:
        rows.append(("last step", f"step {last.step}", last.val, data.val))
    n = data.val.n_documents
    title = f"loss on {model.num_targets:,} held-out tokens ({n:,} document{'s' * (n != 1)})"
    lines = [f"{title:<62}nats/token   bits/byte"]
    for name, description, nats, split in sorted(rows, key=lambda row: (-row[2], row[0])):
        bits = bits_per_byte(nats, len(split) - 1, split.n_bytes)
        lines.append(f"  {name:<12}{description:<48}{nats:>9.4f}   {bits:>9.4f}")
    return "\n".join(lines)


def advice(
    model: Losses, last: Losses, references: Mapping[str, float], config: RunConfig, copies: tuple[int, int]
) -> list[str]:
    """A line for each thing that is wrong with the model, and what to try; `copies` as by `longest_copies`."""
    optim, lines = config.optim, []
    lower = f"--optim.lr {optim.lr / 10:g} --optim.muon_lr {optim.muon_lr / 10:g}"
    regular = f"--model.dropout {config.model.dropout + 0.2:g}, " * (config.model.dropout < 0.4) + "more text"
    differs = model.train < FAR_BELOW * model.val
    overfits = differs and last.epochs > 1
    gap = ("overfitting", regular) if last.epochs > 1 else ("held-out text unlike the rest", "another --data.val")
    for name in ("uniform", "unigram", "trigram"):
        if not model.val < references[name]:
            losses = f"{model.val:.4f} against {references[name]:.4f} nats/token"
            longer = "more --train.minutes" if optim.decay_at else f"--train.steps {2 * config.train.steps}"
            more = "more text" if overfits or model is not last else f"more text, {longer}"
            remedy = lower if name == "uniform" and not overfits else more
            lines.append(f"worse than {name} ({DESCRIPTIONS[name]}): {losses}; try {remedy}")
            break
    if last.val > model.val + RISE:
        rose = f"held-out loss is lowest at step {model.step} ({model.val:.4f}), and {last.val:.4f} at step {last.step}"
        is_learned = last.train < model.val
        problem, remedy = (gap[0], f"{gap[1]}, fewer steps") if is_learned else ("unstable", lower)
        lines.append(f"{problem}: {rose}, where training loss is {last.train:.4f}; try {remedy}")
    elif differs:
        losses = f"training loss {model.train:.4f} is far below held-out loss {model.val:.4f}"
        lines.append(f"{gap[0]}: {losses} after {last.epochs:.1f} epochs; try {gap[1]}")
    if copies[0] >= max(10, 2 * copies[1]):
        longest = f"{copies[0]} tokens of a sample are in the training text word for word"
        lines.append(f"memorised: {longest}, of as much held-out text at most {copies[1]}; try {regular}, fewer steps")
    return lines


def longest_copies(trainer: Trainer) -> tuple[int, int]:
    """The most consecutive tokens that occur in the training text: of sampled texts, and of as much held-out text.

    (0, 0) for a text that was not read twice, which is not memorised.
    """
    if trainer.state.tokens_seen < 2 * len(trainer.data.train):
        return 0, 0
    model, tokenizer, val = trainer.model, trainer.data.tokenizer, trainer.data.val
    start = encode_prompt(tokenizer, "", trainer.environment.starts_with_eot)
    seed = derive_seed(trainer.config.run.seed, "copies")
    model.eval()
    sampled = generate_tokens(model, tokenizer, start, COPY_TOKENS, seed, n_samples=COPY_TEXTS)
    model.train()
    firsts = np.linspace(0, max(0, len(val) - COPY_TOKENS), COPY_TEXTS).astype(int)
    corpus = trainer.data.train.tokens[:COPY_LIMIT]
    return longest_run(sampled, corpus), longest_run([val.tokens[i : i + COPY_TOKENS] for i in firsts], corpus)


def longest_run(texts: Iterable[Sequence[int] | np.ndarray], corpus: np.ndarray) -> int:
    """The most consecutive tokens of one of the texts that are consecutive in the corpus."""
    # A character for each token: Python's search in a string is fast.
    found, *wanted = (np.asarray(t, "<u4").tobytes().decode("utf-32-le", "surrogatepass") for t in (corpus, *texts))
    longest = 0
    for text in wanted:
        for i in range(len(text)):
            while i + longest < len(text) and text[i : i + longest + 1] in found:
                longest += 1
    return longest


def plot_loss(path: Path, metrics: list[dict[str, Any]], references: Mapping[str, float], title: str) -> None:
    """`loss.png`: training and validation loss over the steps, and baselines as horizontal lines.

    The legend names them from the highest to the lowest, with their last values.
    """
    best, step = min(((m["val_loss"], m["step"]) for m in metrics if "val_loss" in m), default=(0.0, 0))
    note = f"lowest validation loss: {best:.3f}, at step {step}" if best else ""
    with figure(path, title, note, size=(6.2, 3.6), margins=(0.7, 0.5, 1.9)) as axes:
        from matplotlib.ticker import LogLocator, NullLocator

        for (name, nats), style in zip(references.items(), (":", "-.", "--", "-"), strict=False):
            axes.axhline(nats, color=ACCENT if name == "floor" else MUTED, linestyle=style, linewidth=1.2, label=name)
        for key, name, color in (("loss", "training batch", "#8aa4c8"), ("val_loss", "validation", "#1f3b70")):
            if points := [(m["step"], m[key]) for m in metrics if key in m]:
                axes.plot(*zip(*points, strict=True), color=color, label=name)
        lines = sorted(axes.lines, key=lambda line: -line.get_ydata()[-1])
        labels = [f"{line.get_label()} {line.get_ydata()[-1]:.3f}" for line in lines]
        axes.legend(lines, labels, loc="upper left", bbox_to_anchor=(1, 1))
        axes.plot([step] * bool(best), [best] * bool(best), "o", color="#1f3b70", clip_on=False)
        axes.set(xlabel="step", ylabel="loss (nats/token)", yscale="log", xmargin=0)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
