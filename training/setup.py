"""One run, from its start or resumption to its last word: its parts are built, its loop is run, its news is told."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import CHECKPOINT, CONFIG, UserError, escape_control_chars
from common.files import read_metrics
from data.prepare import TokenizedCorpus
from model.gpt import GPT
from training import checkpoint
from training.checkpoint import Checkpoint, RunEnvironment, TrainState
from training.config import RunConfig, to_toml
from training.device import DistContext, advise_on_oom, compile_model, resolve_attention, should_compile
from training.distributed import gather_weights, is_fsdp, wrap_model
from training.flops import estimate_train_seconds
from training.metrics import Metrics, Progress
from training.optimizer import Optimizer
from training.pace import Pace
from training.report import baseline_losses, plot_loss, table
from training.resuming import check_resumable
from training.run_dir import save_config
from training.saving import CheckpointWriter
from training.text_generation import decode, encode_prompt, generate_tokens
from training.trackers import Tracker
from training.trainer import Trainer, micro_batch_rows

Observe = Callable[[TrainState], None]


class Run:
    """A model, its optimizer, its data, and the folder that it all goes to.

    Args:
        config: the command line's, its folder decided and locked (`training/run_dir.py`).
        machine: where this process computes.
        data: the prepared corpus.

    Raises:
        UserError: for whatever keeps the run from starting.
    """

    def __init__(self, config: RunConfig, ctx: DistContext, data: TokenizedCorpus) -> None:
        if config.train.batch_size % ctx.world_size:
            raise UserError(
                f"train.batch_size is {config.train.batch_size}, which {ctx.world_size} processes cannot share evenly",
                CONFIG,
            )
        ctx.check_same_everywhere({"the corpus": data.fingerprint})
        self.config, self.ctx, self.data = config, ctx, data
        self.folder = Path(config.run.dir)
        self.saver = CheckpointWriter(self.folder, config.train.keep_checkpoints) if ctx.is_main_process else None
        saved = checkpoint.open_checkpoint(Path(config.run.resume)) if config.run.resume else None
        if saved is not None:
            check_resumable(config, saved, data)
            ctx.check_same_everywhere({"the checkpoint": str(saved.state)})
        rows = micro_batch_rows(config, ctx.world_size)
        with advise_on_oom(rows, config.train.batch_size):
            self.model, self.wrapped_model, self.optimizer, state = self.build(saved)
        self.trainer = Trainer(config, ctx, data, self.model, self.wrapped_model, self.optimizer, state, bool(saved))
        self.environment = RunEnvironment(
            data.train.n_documents > 1 or not has_lines(data), data.fingerprint, self.how()
        )
        self.sample: list[int] = []  # tokens of the sample of the moment
        tokens = config.train.batch_size * config.model.context
        self.progress = Progress(state.step, config.train.steps, tokens, ctx.is_main_process)
        if ctx.is_main_process:
            self.metrics = Metrics(self.folder, state)
        self.tracker = Tracker(config, self.folder, self.folder.name, ctx.is_main_process)
        if saved is not None and ctx.is_main_process:
            self.compare_paths(saved.environment.settings)

    @property
    def state(self) -> TrainState:
        """Where the run stands."""
        return self.trainer.state

    def build(self, saved: Checkpoint | None) -> tuple[GPT, nn.Module, Optimizer, TrainState]:
        """The plain model, the one that is stepped, its optimizer, where they stand: new, or as a checkpoint says."""
        config, ctx = self.config, self.ctx
        vocab_size = self.data.tokenizer.vocab_size
        shape = resolve_attention(config.model, ctx.device, ctx.dtype)
        model = GPT(shape, vocab_size, seed=config.run.seed) if saved is None else saved.build_model(shape)
        state = TrainState() if saved is None else saved.state
        stepped = wrap_model(model, ctx, config.train.sharding)
        optimizer = Optimizer(stepped if is_fsdp(stepped) else model, config.optim)
        if saved is not None and state.tokens_seen:  # before the first step that counted there are no moments
            try:
                optimizer.load_state_dict(saved.optimizer_state())
            except ValueError as error:
                raise UserError(f"cannot go on from {saved.folder}: {error}", CHECKPOINT) from error
        stepped, self.is_compiled = self.maybe_compile(stepped, saved)
        return model, stepped, optimizer, state

    def maybe_compile(self, model: nn.Module, saved: Checkpoint | None) -> tuple[nn.Module, bool]:
        """The model compiled where that pays, and whether it is; a resumed run keeps what it started with."""
        config, ctx = self.config, self.ctx
        seconds = estimate_train_seconds(config, self.data.tokenizer.vocab_size, ctx.world_size)
        wanted = should_compile(config.train, seconds, ctx.device)
        if saved is not None and config.train.compile == "auto" and "compiled" in saved.environment.settings:
            wanted = saved.environment.settings["compiled"] == "yes"
        if not wanted:
            return model, False
        shape = (micro_batch_rows(config, ctx.world_size), config.model.context)
        return compile_model(model, torch.zeros(shape, dtype=torch.long, device=ctx.device), ctx)

    def how(self) -> dict[str, str]:
        """The path that the numbers take; another path may round otherwise."""
        ctx = self.ctx
        return {
            "device": ctx.device.type,
            "dtype": str(ctx.dtype).removeprefix("torch."),
            "attention": self.model.config.attention,
            "compiled": "yes" if self.is_compiled else "no",
            "threads": str(torch.get_num_threads()),
            "processes": str(ctx.world_size),
            "torch": torch.__version__,
        }

    def compare_paths(self, before: Mapping[str, str]) -> None:
        """Say what differs from the machine that the run was begun on: the same bits are then not to be expected."""
        now = self.environment.settings
        changed = [f"{key} {before[key]} became {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        if changed:
            self.progress.say(f"resumed on another path, so the last digits may differ: {', '.join(changed)}")

    def begin(self) -> None:
        """Make the folder a run: once the untrained weights are saved, it can be resumed at any moment."""
        if not self.config.run.resume:
            self.save()
            self.trainer.saved = (self.state.step, self.state.last_eval_step)
        if self.ctx.is_main_process:
            save_config(self.config)
        self.introduce()

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
        mode = "compiled" if self.is_compiled else "not compiled"
        say(f"machine {self.ctx.describe()}, {shape.attention} attention, {mode}")
        begin = f"from step {self.state.step} " if self.state.step else ""
        say(f"run     {self.folder}: {begin}to step {train.steps}, {train.batch_size} x {shape.context} tokens each")

    def train(self, observe: Observe, end: float | None = None) -> None:
        """Run the loop.

        Args:
            observe: called at each evaluation, when the model's weights are those of its state.
            end: of a run by minutes: when the last step should be over (`training/pace.py`).
        """
        pace = None if end is None else Pace(end, self.settle)

        def on_evaluation(metrics: dict[str, Any]) -> None:
            if self.ctx.is_main_process:
                self.tell_evaluation(metrics)
                observe(self.state)

        try:
            with advise_on_oom(self.trainer.rows, self.config.train.batch_size):
                look = None if pace is None else (lambda: pace.look(self.config, self.state.step))
                self.trainer.run(self.tell_step, on_evaluation, self.save, look)
            self.finish_saving()
        except SystemExit as stop:
            self.finish_saving()
            self.tracker.close(int(stop.code or 0), patience=5.0)  # whoever asked does not wait for long
            self.progress.say(f"stopped; go on with: python train.py --run.resume {self.folder}")
            raise
        finally:
            self.progress.close()

    def settle(self, config: RunConfig) -> None:
        """Go on with another number of steps; it is written down before anything is done by it."""
        save_config(config)
        self.config = self.trainer.config = config
        self.progress.settle(config.train.steps)
        self.progress.say(f"plan    {config.train.steps:,} steps, by the time that {self.state.step:,} have taken")

    def tell_step(self, metrics: dict[str, Any]) -> None:
        """Log the numbers of a step, or that it was passed over."""
        self.progress.step(metrics["step"], metrics.get("loss"))
        if not self.ctx.is_main_process:
            return
        if "skipped" in metrics:
            self.progress.say(f"step {metrics['step']} passed over: loss or gradient not finite ({metrics['skipped']})")
        metrics["tokens_per_second"] = round(self.progress.speed(metrics["step"]))
        self.metrics.write(metrics)
        self.tracker.log(metrics["step"], {k: v for k, v in metrics.items() if k != "documents"})

    def tell_evaluation(self, metrics: dict[str, Any]) -> None:
        """Log an evaluation, with a sample of what the model writes by now."""
        count, step = self.config.log.sample_tokens, metrics["step"]
        text = self.write_sample(count) if count else None
        ends = {} if text is None else {"samples_end": self.metrics.write_sample(step, text)}
        self.metrics.write({**metrics, **ends})
        self.progress.say(f"step {step:>5}  validation loss {metrics['val_loss']:.4f}")
        if text is not None:
            self.progress.say("    " + text.strip().replace("\n", "\n    "))
        self.tracker.log(step, metrics, sample=text)

    def write_sample(self, count: int) -> str:
        """A sample of the moment; drawn from a generator of its own."""
        tokenizer = self.data.tokenizer
        start = encode_prompt(tokenizer, "", self.environment.starts_with_eot)
        self.model.eval()
        self.sample = generate_tokens(self.model, tokenizer, start, count, self.config.run.seed + self.state.step)
        self.model.train()
        return decode(tokenizer, self.sample[len(start) :])

    def save(self) -> None:
        """Write a checkpoint. Every process takes part: where the model is split, its parts are brought together."""
        gather_weights(self.wrapped_model, self.model)
        moments = self.optimizer.state_dict()
        if self.saver is not None:
            self.metrics.sync()
            self.saver.save(
                self.config,
                self.state,
                checkpoint.model_weights(self.model),
                moments,
                self.data.tokenizer,
                self.model.vocab_size,
                self.environment,
            )

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is verified."""
        if self.saver is not None:
            self.saver.finish()

    def report(self) -> None:
        """The loss in context: a table, and the plot."""
        loss, targets = self.trainer.full_validation_loss()
        gather_weights(self.wrapped_model, self.model)
        if not self.ctx.is_main_process:
            return
        references = baseline_losses(self.data, self.trainer.val_sequences)
        self.metrics.write({"step": self.state.step, "final_val_loss": loss, **references})
        self.progress.say("\n" + table(loss, targets, references, self.data))  # now: pictures take a second
        plot = self.folder / "loss.png"
        title = escape_control_chars(f"{self.data.name}: {self.folder}")
        plot_loss(plot, read_metrics(self.folder / "metrics.jsonl"), references, title)
        self.tracker.log(self.state.step, {"final_val_loss": loss}, image=plot)

    def finish(self, told: list[str], pictures: list[Path], page: Path | None, started: float) -> None:
        """The last words: what the heads do, where everything lies, and how long it took.

        Args:
            told: lines to print; the pictures go to Weights & Biases, the page is named.
        """
        say = self.progress.say
        say("\n" + "\n".join(told))
        for picture in pictures:
            self.tracker.log(self.state.step, {}, image=picture)
        self.tracker.close()
        say(f"\n{time.perf_counter() - started:.0f} s in all; the run is in {self.folder}")
        if page is not None:
            say(f"  open {page}")
        say(f"  python sample.py {self.folder}")
        say(f"  python attend.py summary {self.folder}")


def agreed(config: RunConfig, ctx: DistContext) -> RunConfig:
    """The config with the folder that the first process has decided on, and the same one everywhere.

    Raises:
        UserError: if the processes were started differently (exit code 2).
    """
    folder, resume = json.loads(ctx.broadcast_str(json.dumps([config.run.dir, config.run.resume])))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder, resume=resume))
    ctx.check_same_everywhere({"the configuration": to_toml(config), "the version of torch": torch.__version__})
    return config


def has_lines(data: TokenizedCorpus) -> bool:
    """Whether the training text's beginning holds a line break, after which a sample can begin."""
    seen = np.unique(data.train.read(0, 100_000)).tolist()
    return any(b"\n" in data.tokenizer.token_bytes(token) for token in seen)
