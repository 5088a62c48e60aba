"""Weights & Biases (`log.wandb`): metrics, samples and plots of a run. Its failures never stop training."""

from __future__ import annotations

import dataclasses
import functools
import html
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import escape_control_chars
from common.files import write_atomic
from training.trainer import Callback, Trainer

TIMEOUT_SECONDS = 20  # to wait for the server at the start, and for uploads at the end


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of `WandbTracker` in which any exception ends tracking, not training."""

    @functools.wraps(hook)
    def call(tracker: WandbTracker, *args: Any) -> None:
        try:
            if not tracker.has_failed:
                hook(tracker, *args)
        except Exception as error:
            tracker.has_failed = True
            reason = escape_control_chars((str(error).splitlines() or [""])[0][:150])
            line = f"wandb failed ({type(error).__name__}: {reason}); training continues without it"
            tqdm.write(line, file=sys.stderr)

    return call


class WandbTracker(Callback):
    """Logs a run to Weights & Biases. If wandb fails, one line is printed and training continues without it.

    A resumed run continues the same wandb run, whose id is kept in the run folder. Offline, wandb writes another folder
    with the same id, and `wandb sync` joins them.
    """

    run: Any = None  # wandb.sdk.wandb_run.Run
    has_failed = False

    @guarded
    def on_start(self, trainer: Trainer) -> None:
        import wandb

        log, folder = trainer.config.log, Path(trainer.config.run.dir)
        id_file = folder / "wandb" / "run-id.txt"
        if not id_file.exists():
            write_atomic(id_file, [secrets.token_hex(4).encode()])
        timeouts: Any = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), TIMEOUT_SECONDS)
        settings = wandb.Settings(**timeouts, finish_timeout_raises=True, silent=True, console="off")
        wandb.setup(settings)
        self.run = wandb.init(
            project=escape_control_chars(log.wandb_project),
            name=escape_control_chars(folder.name),
            dir=str(folder.absolute()),
            mode=log.wandb,
            config=dataclasses.asdict(trainer.config),
            allow_val_change=True,
            id=id_file.read_text(encoding="ascii"),
            resume="allow",
            settings=settings,
        )

    @guarded
    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.should_log(metrics):
            values = {f"train/{key}": value for key, value in metrics.items() if key != "step"}
            self.run.log(values, step=metrics["step"])

    @guarded
    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        import wandb

        values = {f"heads/{name}": max(map(max, table)) for name, table in metrics.get("head_scores", {}).items()}
        values |= {"val/loss": metrics["val_loss"], "train/tokens_seen": metrics["tokens_seen"]}
        if "sample" in metrics:
            values["sample"] = wandb.Html(f"<pre>{html.escape(metrics['sample'])}</pre>", inject=False)
        self.run.log(values, step=metrics["step"])

    @guarded
    def on_end(self, trainer: Trainer) -> None:
        import wandb

        values: dict[str, Any] = {f"baseline/{name}": loss for name, loss in trainer.final_metrics.items()}
        values["val/final_loss"] = values.pop("baseline/final_val_loss", None)
        values["train/final_loss"] = values.pop("baseline/final_train_loss", None)
        plots = Path(trainer.config.run.dir).glob("*.png")
        values |= {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted(plots)}
        self.run.log(values)  # without a step: wandb refuses those before the last one

    @guarded
    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)  # a code other than 0 marks it as failed
