"""One run, from its start or resumption to its last word: its parts are built, its loop is run, its news is told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.prepare import Prepared
from data.tokenizer import fingerprint
from model.gpt import GPT
from runtime import checkpoint
from runtime.checkpoint import Checkpoint, TrainState
from runtime.config import RunConfig
from runtime.device import Machine, choose_kernels, compiled, worth_compiling
from runtime.errors import CHECKPOINT, CONFIG, DATA, UserError
from runtime.folder import choose_folder, open_folder
from runtime.log import Metrics, Progress, Wandb, read_metrics
from runtime.optim import Optimizer
from runtime.report import plot_loss, reference_losses, table
from runtime.sampling import decoded, first_tokens, sample_tokens
from runtime.trainer import Trainer

Observe = Callable[[TrainState], None]


class Run:
    """A model, its optimizer, its data, and the folder that it all goes to.

    Args:
        config: the command line's.
        name: of the config file; the folder is named after it.
        machine: where this process computes.
        data: the prepared corpus.

    Raises:
        UserError: for whatever keeps the run from starting.
    """

    def __init__(self, config: RunConfig, name: str, machine: Machine, data: Prepared) -> None:
        if config.train.batch_size % machine.world:
            raise UserError(
                f"train.batch_size is {config.train.batch_size}, which {machine.world} processes cannot share evenly",
                CONFIG,
            )
        self.machine, self.data = machine, data
        self.config = choose_folder(config, name) if machine.is_first else config
        self.folder = Path(self.config.run.dir)
        saved = checkpoint.open_checkpoint(Path(config.run.resume)) if config.run.resume else None
        self.model, self.optimizer, state = self.build(saved)
        self.how = "eager"
        self.trainer = Trainer(self.config, machine, data, self.model, self.faster(), self.optimizer, state)
        self.documents = data.train.n_documents > 1 or not has_lines(data)
        self.sample: list[int] = []  # tokens of the sample of the moment
        if machine.is_first:
            self.folder, self.lock = open_folder(self.config)
            self.metrics = Metrics(self.folder / "metrics.jsonl", state.step)
        self.wandb = Wandb(self.config, self.folder, self.folder.name, machine.is_first)
        tokens = config.train.batch_size * config.model.context
        self.progress = Progress(state.step, config.train.steps, tokens, machine.is_first)

    @property
    def state(self) -> TrainState:
        """Where the run stands."""
        return self.trainer.state

    def build(self, saved: Checkpoint | None) -> tuple[GPT, Optimizer, TrainState]:
        """The model, its optimizer and where they stand: new, or as a checkpoint has them."""
        config, machine = self.config, self.machine
        vocab_size = self.data.tokenizer.vocab_size
        model = GPT(choose_kernels(config.model, machine.device, machine.dtype), vocab_size, seed=config.run.seed)
        state = TrainState()
        if saved is not None:
            check_resumable(config, saved, vocab_size, self.data)
            checkpoint.load_weights(model, saved.weights(), saved.folder)
            state = saved.state
        model.to(machine.device)
        optimizer = Optimizer(model, config.optim, fused=True)
        if saved is not None:
            try:
                optimizer.load_state(saved.moments())
            except ValueError as error:
                raise UserError(f"cannot go on from {saved.folder}: {error}", CHECKPOINT) from error
        return model, optimizer, state

    def faster(self) -> nn.Module:
        """The model as it is stepped: compiled where that pays, shared where there are several processes."""
        train, model = self.config.train, self.model
        tokens = train.steps * train.batch_size * model.config.context
        fast: nn.Module = self.machine.share(model)
        parameters = sum(p.numel() for p in model.parameters())
        if worth_compiling(train, tokens, parameters, self.machine.device):
            rows = min(train.micro_batch or train.batch_size, train.batch_size // self.machine.world)
            example = torch.zeros(rows, model.config.context, dtype=torch.long, device=self.machine.device)
            fast = compiled(fast, example, self.machine)
            self.how = "compiled" if fast is not model else "eager"
        return fast

    def introduce(self) -> None:
        """The first lines of output: what is trained, on what, where, and how."""
        model, data, train = self.model, self.data, self.config.train
        shape = model.config
        parameters = sum(p.numel() for p in model.parameters())
        say = self.progress.say
        say(
            f"data    {data.name}: {data.train.n_documents:,} documents, {len(data.train):,} training tokens; "
            f"{data.tokenizer.name} vocabulary of {data.tokenizer.vocab_size:,}"
        )
        say(
            f"model   {shape.preset}: {shape.n_layers} layers, {shape.n_heads} heads, width {shape.d_model}, "
            f"context {shape.context}; {parameters:,} parameters"
        )
        say(f"machine {self.machine.describe()}, {shape.kernels} attention, {self.how}")
        begin = f"from step {self.state.step} " if self.state.step else ""
        say(f"run     {self.folder}: {begin}to step {train.steps}, {train.batch_size} x {shape.context} tokens each")

    def train(self, observe: Observe) -> None:
        """Run the loop; `observe` is called at each evaluation, when the model's weights are those of its state."""

        def on_evaluation(metrics: dict[str, Any]) -> None:
            if self.machine.is_first:
                self.tell_evaluation(metrics)
                observe(self.state)

        try:
            self.trainer.run(self.tell_step, on_evaluation, self.save)
        except SystemExit:
            self.progress.say(f"stopped; go on with: python train.py --run.resume {self.folder}")
            raise
        finally:
            self.progress.close()

    def tell_step(self, metrics: dict[str, Any]) -> None:
        """Log the numbers of a step."""
        self.progress.step(metrics["step"], metrics["loss"])
        if self.machine.is_first:
            metrics["tokens_per_second"] = round(self.progress.speed(metrics["step"]))
            self.metrics.write(metrics)
            self.wandb.log(metrics["step"], metrics)

    def tell_evaluation(self, metrics: dict[str, Any]) -> None:
        """Log an evaluation, with a sample of what the model writes by now."""
        self.metrics.write(metrics)
        count = self.config.log.sample_tokens
        text = self.write_sample(count) if count else None
        self.progress.say(f"step {metrics['step']:>5}  validation loss {metrics['val_loss']:.4f}")
        if text is not None:
            self.progress.say("    " + text.strip().replace("\n", "\n    "))
        self.wandb.log(metrics["step"], metrics, sample=text)

    def write_sample(self, count: int) -> str:
        """A sample of the moment, kept in samples.txt; drawn from a generator of its own."""
        tokenizer = self.data.tokenizer
        start = first_tokens(tokenizer, "", self.documents)
        self.model.eval()
        self.sample = sample_tokens(self.model, tokenizer, start, count, self.config.run.seed + self.state.step)
        self.model.train()
        text = decoded(tokenizer, self.sample[len(start) :])
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"step {self.state.step}\n{text}\n\n")
        return text

    def save(self) -> None:
        """Write a checkpoint."""
        if self.machine.is_first:
            moments, tokenizer = self.optimizer.state(), self.data.tokenizer
            checkpoint.save(self.folder, self.config, self.state, self.model, moments, tokenizer, self.documents)

    def report(self) -> None:
        """The loss in context: a table, and the plot."""
        loss, targets = self.trainer.whole_validation()
        if not self.machine.is_first:
            return
        references = reference_losses(self.data, self.trainer.val_windows)
        self.metrics.write({"step": self.state.step, "final_val_loss": loss, **references})
        plot = self.folder / "loss.png"
        plot_loss(plot, read_metrics(self.folder / "metrics.jsonl"), references, f"{self.data.name}: {self.folder}")
        self.wandb.log(self.state.step, {"final_val_loss": loss}, image=plot)
        print("\n" + table(loss, targets, references, self.data))

    def finish(self, told: list[str], pictures: list[Path], page: Path | None, started: float) -> None:
        """The last words: what the heads do, where everything lies, and how long it took.

        Args:
            told: lines to print; the pictures go to Weights & Biases, the page is named.
        """
        print("\n" + "\n".join(told))
        for picture in pictures:
            self.wandb.log(self.state.step, {}, image=picture)
        self.wandb.close()
        print(f"\n{time.perf_counter() - started:.0f} s in all; the run is in {self.folder}")
        if page is not None:
            print(f"  open {page}")
        print(f"  python sample.py {self.folder}")
        print(f"  python attend.py summary {self.folder}")


def has_lines(data: Prepared) -> bool:
    """Whether the training text's beginning holds a line break, after which a sample can begin."""
    seen = np.unique(data.train.read(0, 100_000)).tolist()
    return any(b"\n" in data.tokenizer.token_bytes(token) for token in seen)


def check_resumable(config: RunConfig, saved: Checkpoint, vocab_size: int, data: Prepared) -> None:
    """Steps, rates and evaluation may change on resuming; shape, tokenizer and seed may not.

    Raises:
        UserError: naming what differs.
    """
    before, now = dataclasses.asdict(saved.config), dataclasses.asdict(config)
    fixed = [("model", key) for key in now["model"] if key != "kernels"] + [("run", "seed"), ("optim", "name")]
    fixed += [("data", key) for key in now["data"] if key != "workers"]
    for section, key in fixed:
        if before[section][key] != now[section][key]:
            raise UserError(
                f"{section}.{key} was {before[section][key]} in {saved.folder} and cannot become "
                f"{now[section][key]} on resuming; start a new run for that"
            )
    if vocab_size != saved.vocab_size or fingerprint(data.tokenizer) != fingerprint(saved.tokenizer()):
        raise UserError(
            f"the corpus or its tokenizer has changed since {saved.folder} was written; start a new run", DATA
        )
