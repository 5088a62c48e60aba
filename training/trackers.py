"""Weights & Biases (`log.wandb`): metrics, samples and plots of a run. Its failures never stop training."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import escape_control_chars
from training.trainer import Callback, Trainer

TIMEOUT_SECONDS = 20
"""How long to wait for the server at the start, and for uploads at the end."""


class WandbTracker(Callback):
    """Logs a run to Weights & Biases. If wandb fails, one line is printed and training continues without it.

    A resumed run continues the same wandb run, whose id is kept in the run folder. Offline, wandb writes another folder
    with the same id, and `wandb sync` joins them.
    """

    def __init__(self) -> None:
        self.run: Any = None  # wandb.sdk.wandb_run.Run; None once wandb has failed

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Any exception of wandb ends tracking, not training."""
        try:
            yield
        except Exception as error:
            self.run = None
            reason = (str(error).splitlines() or [""])[0][:150]
            line = (
                f"wandb failed ({type(error).__name__}: {escape_control_chars(reason)}); training continues without it"
            )
            tqdm.write(line, file=sys.stderr)

    def on_start(self, trainer: Trainer) -> None:
        """Start the wandb run, or continue it."""
        log, folder = trainer.config.log, Path(trainer.config.run.dir)
        with self.guard():
            import wandb

            settings = wandb.Settings(
                init_timeout=TIMEOUT_SECONDS,
                login_timeout=TIMEOUT_SECONDS,
                finish_timeout=TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                silent=True,
                console="off",
            )
            wandb.setup(settings)
            self.run = wandb.init(
                project=escape_control_chars(log.wandb_project),
                name=escape_control_chars(folder.name),
                dir=str(folder.absolute()),
                mode=log.wandb,
                config=dataclasses.asdict(trainer.config),
                allow_val_change=True,
                id=run_id(folder),
                resume="allow",
                settings=settings,
            )

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        if trainer.should_log(metrics):
            values = {f"train/{key}": value for key, value in metrics.items() if key not in ("step", "documents")}
            self.log(metrics["step"], values)

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Log the validation loss, the highest score of any head, and the sample."""
        heads = {f"heads/{name}": max(map(max, table)) for name, table in metrics.get("head_scores", {}).items()}
        values = {"val/loss": metrics["val_loss"], "train/tokens_seen": metrics["tokens_seen"], **heads}
        self.log(metrics["step"], values, sample=metrics.get("sample"))

    def on_end(self, trainer: Trainer) -> None:
        """Log the final loss, the baselines and the plots in the run folder."""
        baselines = {f"baseline/{name}": loss for name, loss in trainer.final_metrics.items()}
        final = {"val/final_loss": baselines.pop("baseline/final_val_loss", None), **baselines}
        self.log(trainer.state.step, final, images=sorted(Path(trainer.config.run.dir).glob("*.png")))

    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        """Finish the wandb run; a code other than 0 marks it as failed."""
        if self.run is not None:
            with self.guard():
                self.run.finish(exit_code=exit_code)

    def log(self, step: int, values: dict[str, Any], sample: str | None = None, images: Sequence[Path] = ()) -> None:
        """`wandb.log`, unless wandb has failed before."""
        if self.run is None:
            return
        with self.guard():
            import wandb

            if sample is not None:
                values["sample"] = wandb.Html(f"<pre>{html.escape(sample)}</pre>", inject=False)
            values |= {f"plots/{path.stem}": wandb.Image(str(path)) for path in images}
            self.run.log(values, step=step)


def run_id(folder: Path) -> str:
    """The wandb run id that the run folder keeps; a new one the first time."""
    file = folder / "wandb" / "run-id.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
    return file.read_text(encoding="ascii").strip()
