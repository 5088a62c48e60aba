"""TensorBoard and Weights & Biases (`log.tensorboard`, `log.wandb`): metrics, samples and plots of a run."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import escape_control_chars
from common.files import write_atomic
from training.trainer import Callback, Trainer

TIMEOUT_SECONDS = 20  # to wait for the server at the start, and for uploads at the end


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of a `Tracker` in which any exception ends tracking, not training."""

    @functools.wraps(hook)
    def call(tracker: Tracker, *args: Any) -> None:
        try:
            if not tracker.has_failed:
                hook(tracker, *args)
        except Exception as error:
            tracker.has_failed = True
            reason = escape_control_chars(str(error).partition("\n")[0][:150])
            line = f"{tracker.name} failed ({type(error).__name__}: {reason}); training continues without it"
            tqdm.write(line, file=sys.stderr)

    return call


class Tracker(Callback):
    """Logs a run elsewhere. If that fails, one line is printed and training continues without it."""

    name = ""
    has_failed = False

    def log(self, metrics: Mapping[str, float | str | Path], step: int) -> None:
        """Send numbers, texts and figures (paths of PNG files), named such as `val/loss`."""
        raise NotImplementedError

    @guarded
    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.should_log(metrics):
            self.log({f"train/{key}": value for key, value in metrics.items() if key != "step"}, metrics["step"])

    @guarded
    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        values = {f"heads/{name}": max(map(max, table)) for name, table in metrics.get("head_scores", {}).items()}
        values |= {"val/loss": metrics["val_loss"], "train/tokens_seen": metrics["tokens_seen"]}
        if "sample" in metrics:
            values["sample"] = metrics["sample"]
        self.log(values, metrics["step"])

    @guarded
    def on_end(self, trainer: Trainer) -> None:
        names = {"final_val_loss": "val/final_loss", "final_train_loss": "train/final_loss"}
        values: dict[str, Any] = {names.get(k, f"baseline/{k}"): loss for k, loss in trainer.final_metrics.items()}
        plots = sorted(Path(trainer.config.run.dir).glob("*.png"))
        last_step = trainer.saved[0] if trainer.saved else trainer.state.step  # the state may be the best step's now
        self.log({**values, **{f"plots/{path.stem}": path for path in plots}}, last_step)


class TensorBoardTracker(Tracker):
    """Writes event files for TensorBoard into the folder `tensorboard` of the run."""

    name = "tensorboard"
    writer: Any = None  # torch.utils.tensorboard.SummaryWriter

    @guarded
    def on_start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = trainer.state.step  # TensorBoard drops what a run that was killed has logged after its checkpoint
        self.writer = SummaryWriter(Path(trainer.config.run.dir) / self.name, purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float | str | Path], step: int) -> None:
        from matplotlib.image import imread

        for name, value in metrics.items():
            if isinstance(value, Path):
                self.writer.add_image(name, imread(value), step, dataformats="HWC")
            elif isinstance(value, str):
                self.writer.add_text(name, f"<pre>{html.escape(value)}</pre>", step)
            else:
                self.writer.add_scalar(name, value, step)

    @guarded
    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbTracker(Tracker):
    """Logs to Weights & Biases. The `WANDB_` variables of the environment take precedence over our defaults.

    A resumed run continues the same wandb run, whose id is kept in the run folder. Offline, wandb writes another folder
    with the same id, and `wandb sync` joins them.
    """

    name = "wandb"
    run: Any = None  # wandb.sdk.wandb_run.Run

    @guarded
    def on_start(self, trainer: Trainer) -> None:
        import wandb

        log, folder = trainer.config.log, Path(trainer.config.run.dir)
        id_file = folder / "wandb" / "run-id.txt"
        if (run_id := os.environ.get("WANDB_RUN_ID", "")) or not id_file.exists():
            write_atomic(id_file, [(run_id or secrets.token_hex(4)).encode()])
        timeouts: Any = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), TIMEOUT_SECONDS)
        settings = wandb.Settings(**wandb_defaults(**timeouts, silent=True, console="off"), finish_timeout_raises=True)
        wandb.setup(settings)
        name, place = escape_control_chars(folder.name), str(folder.absolute())
        options = wandb_defaults(project="glassgpt", name=name, mode=log.wandb, dir=place, resume="allow")
        if log.wandb_project:
            options["project"] = escape_control_chars(log.wandb_project)
        if log.wandb == "offline":  # then nothing is sent, whatever WANDB_MODE says
            options["mode"] = "offline"
        self.run = wandb.init(
            **options,
            config=dataclasses.asdict(trainer.config),
            allow_val_change=True,
            id=id_file.read_text(encoding="utf-8"),
            settings=settings,
        )

    def log(self, metrics: Mapping[str, float | str | Path], step: int) -> None:
        import wandb

        def convert(value: float | str | Path) -> Any:
            if isinstance(value, str):
                return wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)
            return wandb.Image(str(value)) if isinstance(value, Path) else value

        self.run.log({name: convert(value) for name, value in metrics.items()}, step=step)

    @guarded
    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)  # a code other than 0 marks it as failed


def wandb_defaults(**defaults: Any) -> dict[str, Any]:
    """Those arguments of wandb that no variable such as `WANDB_NAME` sets."""
    return {name: value for name, value in defaults.items() if f"WANDB_{name.upper()}" not in os.environ}
