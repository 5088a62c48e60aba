"""Metrics of a run: `metrics.jsonl`, `samples.txt`, and the progress bar or plain lines."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import DISK_OR_MEMORY, UserError
from common.files import read_metrics, write_atomic
from training.checkpoint import TrainState
from training.device import measure_matmul_flops
from training.flops import step_flops
from training.text_generation import escape_text
from training.trainer import Callback, Trainer

PLAIN_SECONDS = 10.0  # between two progress lines, at least, where there is no terminal


class MetricsLogger(Callback):
    """Writes `metrics.jsonl`, one JSON object a line, each with its step, and `samples.txt`.

    A resumed run first drops what came after its step, so that nothing is missing or written twice. The logger adds
    `tokens_per_second` (over the steps since the last line), `mfu` (model FLOPs utilization: the share of the FLOP/s of
    a large matrix product on this device) and `peak_memory_mb` to the metrics of a step. Raises UserError (6) if a file
    cannot be written.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self.path, self.samples = folder / "metrics.jsonl", folder / "samples.txt"
        lines = [line for line in read_metrics(self.path) if belongs_to(line, state)]
        write_atomic(self.path, ((json.dumps(line) + "\n").encode() for line in lines))
        samples = "".join(format_sample(line) for line in lines if "sample" in line)
        write_atomic(self.samples, [samples.encode("utf-8", "replace")])
        self.opened = folder.stat()
        self.last_step, self.last_seconds, self.peak_flops = state.step, 0.0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self.peak_flops = measure_matmul_flops(trainer.ctx) * trainer.ctx.world_size

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if not trainer.should_log(metrics):
            return
        step, config, device = trainer.state.step, trainer.config, trainer.ctx.device
        seconds = max(1e-9, trainer.train_seconds - self.last_seconds)
        steps_per_second = (step - self.last_step) / seconds
        self.last_step, self.last_seconds = step, trainer.train_seconds
        flops = step_flops(config, trainer.model.vocab_size)
        metrics["tokens_per_second"] = round(steps_per_second * config.train.batch_size * config.model.context)
        metrics["mfu"] = round(steps_per_second * flops / self.peak_flops, 4)
        if memory := peak_memory(device):
            metrics["peak_memory_mb"] = round(memory / 1e6)
        self.append(self.path, json.dumps(metrics) + "\n")

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if "sample" in metrics:
            self.append(self.samples, format_sample(metrics))
        self.append(self.path, json.dumps(metrics) + "\n")

    def on_save(self, trainer: Trainer) -> None:
        self.append(self.path, "", sync=True)  # a checkpoint must not outlive the metrics of its steps

    def on_end(self, trainer: Trainer) -> None:
        self.append(self.path, json.dumps({"step": trainer.state.step, **trainer.final_metrics}) + "\n")

    def append(self, path: Path, text: str, sync: bool = False) -> None:
        """Append to a file, and wait for the disk if `sync`. Raises UserError (6) if it is gone or cannot be written."""
        try:
            if not os.path.samestat(self.opened, path.parent.stat()):
                raise OSError(0, "another folder has taken the place of the run's")
            with path.open("r+", encoding="utf-8", newline="\n") as file:
                file.seek(0, os.SEEK_END)
                file.write(text)
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


class FolderCheck(Callback):
    """Stops a run whose folder has moved before the other callbacks write to a new or another one at its place."""

    def __init__(self, logger: MetricsLogger) -> None:
        self.logger = logger

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.logger.append(self.logger.path, "")

    def on_end(self, trainer: Trainer) -> None:
        self.logger.append(self.logger.path, "")


class ProgressBar(Callback):
    """A bar on a terminal; elsewhere a line every `PLAIN_SECONDS`. Prints a line at each evaluation."""

    def __init__(self, state: TrainState, steps: int) -> None:
        self.first_step, self.start = state.step, time.perf_counter()
        self.is_terminal, self.printed = sys.stderr.isatty(), self.start
        self.latest: dict[str, Any] = {}
        self.bar = tqdm(
            total=steps, initial=state.step, unit="step", disable=not self.is_terminal, leave=False, dynamic_ncols=True
        )

    def on_start(self, trainer: Trainer) -> None:
        self.start = self.printed = time.perf_counter()

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.bar.total = trainer.config.train.steps
        self.bar.update(metrics["step"] - self.bar.n)
        if "skipped" in metrics:
            overflow = "its gradient overflowed in fp16; the loss scale falls to {loss_scale:g}"
            other = "loss or gradient not finite ({skipped} so far)"
            print_line(("step {step} skipped: " + (overflow if "loss_scale" in metrics else other)).format(**metrics))
        elif trainer.should_log(metrics):
            self.latest = metrics
            self.bar.set_postfix_str(format_metrics(metrics))
            if not self.is_terminal and time.perf_counter() - self.printed > PLAIN_SECONDS:
                self.print_progress(trainer, metrics)

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.print_progress(trainer, {**self.latest, **metrics})
        if "sample" in metrics:
            print_line("    " + metrics["sample"].strip().replace("\n", "\n    "))

    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        self.bar.close()

    def print_progress(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        step, steps, self.printed = metrics["step"], trainer.config.train.steps, time.perf_counter()
        left = (self.printed - self.start) * (steps - step) / max(1, step - self.first_step)
        parts = [f"step {step}/{steps}", format_metrics(metrics), f"{tqdm.format_interval(left)} left"]
        print_line(" | ".join(parts if step < steps else parts[:2]))


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """`loss 0.311 | val 0.3047 | lr 1.0e-02 | grad 0.42 | 54.0k tok/s | mfu 40%`, as far as they are there."""
    formats = {
        "loss": lambda value: f"loss {value:.3f}",
        "val_loss": lambda value: f"val {value:.4f}",
        "lr": lambda value: f"lr {value:.1e}",
        "grad_norm": lambda value: f"grad {value:.2f}",
        "tokens_per_second": lambda value: f"{tqdm.format_sizeof(value)} tok/s",
        "mfu": lambda value: f"mfu {value:.0%}",
    }
    return " | ".join(text(metrics[name]) for name, text in formats.items() if name in metrics)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a CUDA GPU, else the peak resident memory of this process; 0 on Windows, which has no `resource`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def print_line(text: str) -> None:
    """Print to stdout without breaking the progress bar; nothing once stdout is closed."""
    try:
        tqdm.write(escape_text(text), file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # the terminal or the reader of a pipe is gone; training continues
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def format_sample(metrics: Mapping[str, Any]) -> str:
    return f"step {metrics['step']}\n{metrics['sample']}\n\n"


def belongs_to(line: Mapping[str, Any], state: TrainState) -> bool:
    """Whether a line of metrics was written by `state` or before it."""
    if "final_val_loss" in line or line["step"] > state.step:
        return False
    return "val_loss" not in line or line["step"] <= state.last_eval_step or line["step"] < state.step
