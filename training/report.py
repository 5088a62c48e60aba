"""The final loss compared with baselines: a table and `loss.png`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import escape_control_chars
from common.files import read_metrics
from data.ngram_baseline import baselines, bits_per_byte
from data.prepare import TokenizedCorpus
from training.distributed import gather_weights
from training.metrics import print_line
from training.trainer import Callback, Trainer

DESCRIPTIONS = {
    "uniform": "every token equally likely",
    "unigram": "token frequencies",
    "trigram": "the two tokens before it",
    "floor": "entropy of the corpus: the lowest possible loss",
}


class LossReport(Callback):
    """At the end of training: the loss on the whole validation split, and the baselines, as a table and a plot."""

    def on_end(self, trainer: Trainer) -> None:
        """Every process takes part."""
        loss, num_targets = trainer.validation_loss(trainer.final_subset)
        gather_weights(trainer.wrapped_model, trainer.model)
        if not trainer.ctx.is_main_process:
            return
        references = baseline_losses(trainer.data)
        trainer.final_metrics = {"final_val_loss": loss, **references}
        print_line("\n" + table(loss, num_targets, references, trainer.data))
        folder = Path(trainer.config.run.dir)
        title = escape_control_chars(f"{trainer.data.name}: {folder}")
        plot_loss(folder / "loss.png", read_metrics(folder / "metrics.jsonl"), references, title)


def baseline_losses(data: TokenizedCorpus) -> dict[str, float]:
    """Losses in nats/token to compare the model's with; `floor` where the entropy of the corpus is known."""
    losses = dict(baselines(data.train, data.val, data.tokenizer.vocab_size))
    if data.nats_per_document is not None:
        # Every token after the first is a target once, the end-of-text tokens included.
        losses["floor"] = data.nats_per_document * data.val.n_documents / (len(data.val) - 1)
    return losses


def table(loss: float, num_targets: int, references: Mapping[str, float], data: TokenizedCorpus) -> str:
    """The model's loss and the baselines, highest first, in nats/token and bits/byte."""
    rows = sorted([*references.items(), ("this model", loss)], key=lambda row: (-row[1], row[0]))
    lines = [f"loss on {num_targets:,} held-out tokens ({data.val.n_documents:,} documents)   nats/token   bits/byte"]
    for name, nats in rows:
        bits = bits_per_byte(nats, len(data.val) - 1, data.val.n_bytes)
        lines.append(f"  {name:<12}{DESCRIPTIONS.get(name, ''):<48}{nats:>9.4f}   {bits:>9.4f}")
    if "floor" in references:
        gap = loss - references["floor"]
        lines.append(f"  this model is {abs(gap):.4f} nats/token {'above' if gap > 0 else 'below'} the floor")
    return "\n".join(lines)


def plot_loss(path: Path, metrics: list[dict[str, Any]], references: Mapping[str, float], title: str) -> None:
    """`loss.png`: training and validation loss over the steps, baselines as horizontal lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    val = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
    axes.plot(*zip(*train, strict=True), color="#8aa4c8", linewidth=1, label="training batch")
    axes.plot(*zip(*val, strict=True), color="#1f3b70", linewidth=2, marker="o", markersize=3, label="validation")
    for name, nats in references.items():
        color, style = ("#c0392b", "-") if name == "floor" else ("#888888", ":")
        axes.axhline(nats, color=color, linestyle=style, linewidth=1.2)
        place: Any = {"xytext": (-4, 3), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"{name} {nats:.3f}", (1, nats), **place, ha="right", fontsize=8, color=color)
    axes.set(xlabel="step", ylabel="loss (nats/token)", title=title.replace("$", r"\$"), yscale="log")
    axes.set_ylim(0.9 * min([*references.values(), *(loss for _, loss in train + val)]), None)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.6))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
