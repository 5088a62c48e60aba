"""Build a trainer from a config, and the callbacks that a run of `train.py` has."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import CHECKPOINT, DATA, UserError, quote_arg
from data.ngram_baseline import unlikeness
from data.prepare import TokenizedCorpus
from model.gpt import GPT
from training.checkpoint import Checkpoint, CheckpointWriter, RunEnvironment, TrainState, model_weights, open_checkpoint
from training.config import RunConfig, to_toml
from training.device import DistContext, advise_on_oom, compile_model, resolve_attention, should_compile
from training.distributed import gather_weights, is_fsdp, wrap_model
from training.flops import step_flops
from training.metrics import FolderCheck, MetricsLogger, ProgressBar, print_line
from training.optimizer import Optimizer, get_lr_scale
from training.pretrained import initial_model
from training.report import LossReport
from training.run_dir import save_config
from training.text_generation import encode_prompt, generate_tokens
from training.trackers import TensorBoardTracker, WandbTracker
from training.trainer import Callback, Trainer, derive_seed, micro_batch_rows


class Checkpointer(Callback):
    """Writes checkpoints and `config.toml`.

    Create it before the run's newest checkpoint is opened: it first completes or removes what a killed process left.
    """

    def __init__(self, config: RunConfig, ctx: DistContext) -> None:
        folder = Path(config.run.dir)
        self.saver = CheckpointWriter(folder, config.train.keep_checkpoints) if ctx.is_main_process else None
        self.saved_config: RunConfig | None = None

    def on_start(self, trainer: Trainer) -> None:
        if self.saver is not None and trainer.resumed_from is not None:
            self.update_config(trainer.config)  # some options may have changed

    def update_config(self, config: RunConfig) -> None:
        """Write `config.toml`, unless nothing changed: it may have been edited for the next start."""
        if config != self.saved_config:
            save_config(config)
        self.saved_config = config

    def on_save(self, trainer: Trainer) -> None:
        """Every process takes part, since FSDP parameters are gathered."""
        gather_weights(trainer.wrapped_model, trainer.model)
        optimizer_state = trainer.optimizer.state_dict()
        if self.saver is not None:
            weights, tokenizer = model_weights(trainer.model), trainer.data.tokenizer
            self.saver.save(trainer.config, trainer.state, weights, optimizer_state, tokenizer, trainer.environment)
            self.update_config(trainer.config)  # after the checkpoint: a folder with a config can be resumed

    def on_exit(self, trainer: Trainer, exit_code: int) -> None:
        if self.saved_config is not None and (trainer.is_stopped or exit_code > 128):  # also during the report
            print_line(f"stopped; resume with: python train.py --run.resume {quote_arg(trainer.config.run.dir)}")


class TextSample(Callback):
    """Samples `log.sample_tokens` tokens at each evaluation, with a generator of its own, as `metrics["sample"]`."""

    def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        config, model, tokenizer = trainer.config, trainer.model, trainer.data.tokenizer
        if not config.log.sample_tokens:
            return
        start = encode_prompt(tokenizer, "", trainer.environment.starts_with_eot)
        seed = derive_seed(config.run.seed, "sample", trainer.state.step)
        model.eval()
        tokens = generate_tokens(model, tokenizer, start, config.log.sample_tokens, seed)[0]
        model.train()
        trainer.sample_tokens, metrics["sample"] = start + tokens, tokenizer.decode(tokens)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.sample_tokens is None:  # the best weights were loaded: the sample is that of their evaluation again
            self.on_eval(trainer, {})


def get_callbacks(trainer: Trainer, checkpointer: Checkpointer, recorder: object | None = None) -> list[object]:
    """The callbacks of a run, in order; `recorder` adds to the metrics of an evaluation (inspection's AttentionRecorder)."""
    if not trainer.ctx.is_main_process:
        return [LossReport(), checkpointer]
    config, state = trainer.config, trainer.state
    metrics, bar = MetricsLogger(Path(config.run.dir), state), ProgressBar(state, config.train.steps)
    trackers: list[object] = [TensorBoardTracker()] if config.log.tensorboard == "on" else []
    trackers += [WandbTracker()] if config.log.wandb != "disabled" else []
    recorders = [LossReport(), TextSample(), *([recorder] if recorder else [])]
    return [FolderCheck(metrics), *recorders, metrics, bar, checkpointer, *trackers]


def broadcast_config(config: RunConfig, ctx: DistContext) -> RunConfig:
    """The config with the run folder of the main process. Raises UserError (2) if the processes have different configs."""
    folder, resume = json.loads(ctx.broadcast_str(json.dumps([config.run.dir, config.run.resume])))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder, resume=resume))
    ctx.check_same_everywhere("the configuration", f"torch {torch.__version__}\n{to_toml(config)}")
    return config


def build_trainer(config: RunConfig, ctx: DistContext, data: TokenizedCorpus) -> Trainer:
    """The trainer of a new run, or of a resumed one from its newest checkpoint; without callbacks.

    Raises UserError if the batch cannot be divided among the processes (exit code 2), the checkpoint cannot be resumed
    with this config (2) or corpus (3), is damaged (4), or memory is full (6).
    """
    rows = micro_batch_rows(config, ctx.world_size)
    ctx.check_same_everywhere("the corpus", data.fingerprint)
    saved = open_checkpoint(Path(config.run.resume), "last") if config.run.resume else None
    if saved is not None:
        check_resumable(config, saved, data)
        ctx.check_same_everywhere("the checkpoint", str(saved.state))
    with advise_on_oom(rows, config.train.batch_size):
        shape, vocab_size = resolve_attention(config.model, ctx.device, ctx.dtype), data.tokenizer.vocab_size
        if saved is not None:
            model = saved.build_model(shape)
        else:
            model = initial_model(shape, data.tokenizer) if shape.init else GPT(shape, vocab_size, config.run.seed)
        wrapped = wrap_model(model, ctx, config.train.sharding)
        optimizer = Optimizer(wrapped if is_fsdp(wrapped) else model, config.optim)
        if saved is not None and saved.state.tokens_seen:  # the optimizer has no state before its first step
            try:
                optimizer.load_state_dict(saved.optimizer_state())
            except ValueError as error:
                raise UserError(f"cannot resume from {saved.folder}: {error}", CHECKPOINT) from error
        wrapped, is_compiled = maybe_compile(wrapped, config, ctx, vocab_size, saved)
    trainer = Trainer(config, ctx, data, model, wrapped, optimizer, TrainState() if saved is None else saved.state)
    if saved is not None:
        trainer.resumed_from, trainer.saved = saved, (saved.state.step, saved.state.last_eval_step)
    trainer.environment = describe_environment(trainer, is_compiled)
    return trainer


def maybe_compile(
    model: nn.Module, config: RunConfig, ctx: DistContext, vocab_size: int, saved: Checkpoint | None
) -> tuple[nn.Module, bool]:
    """The model, compiled where that pays, and whether it is compiled; a resumed run keeps its choice."""
    flops = config.train.steps * step_flops(config, vocab_size) / ctx.world_size
    wanted = should_compile(config.train, flops, ctx.device)
    if saved is not None and config.train.compile == "auto" and "compiled" in saved.environment.settings:
        wanted = saved.environment.settings["compiled"] == "yes"
    if not wanted:
        return model, False
    shape = (micro_batch_rows(config, ctx.world_size), config.model.context)
    return compile_model(model, torch.zeros(shape, dtype=torch.long, device=ctx.device), ctx)


def check_resumable(config: RunConfig, saved: Checkpoint, data: TokenizedCorpus) -> None:
    """Steps, learning rates, evaluation, memory and device may change on resuming; raises UserError that names the option if
    model, batches or seed changed (2), or the corpus (3)."""
    before, now = dataclasses.asdict(saved.config), dataclasses.asdict(config)
    fixed = [("model", key) for key in now["model"] if key != "attention"]
    fixed += [("run", "seed"), ("optim", "optimizer"), ("train", "batch_size"), ("log", "prompts")]
    fixed += [("data", key) for key in now["data"] if key not in ("source", "val")]  # a text may move
    for section, key in fixed:
        if key == "tokenizer" and os.path.isdir(now[section][key]):
            continue  # a folder may move; the tokenizers are compared below
        if before[section][key] != now[section][key]:
            raise UserError(
                f"{section}.{key} was {before[section][key]} in {saved.folder} and cannot become "
                f"{now[section][key]} on resuming; start a new run for that"
            )
    same_tokenizer = data.tokenizer.fingerprint() == saved.tokenizer().fingerprint()
    if not same_tokenizer or saved.environment.corpus not in ("", data.fingerprint):
        problem = f"the corpus or its tokenizer has changed since {saved.folder} was written"
        raise UserError(f"{problem}; restore the old text, or start a new run", DATA)


def describe_environment(trainer: Trainer, is_compiled: bool) -> RunEnvironment:
    """Besides the config, what decides the last bits of the results, and how a text begins."""
    data, ctx = trainer.data, trainer.ctx
    seen = np.zeros(data.tokenizer.vocab_size, dtype=bool)
    for first in range(0, len(data.train), 1 << 20):
        seen[data.train.tokens[first : first + (1 << 20)]] = True
    has_lines = any(b"\n" in data.tokenizer.token_bytes(token) for token in np.flatnonzero(seen).tolist())
    settings = {
        "device": ctx.device.type,
        "dtype": str(ctx.dtype).removeprefix("torch."),
        "attention": trainer.model.config.attention,
        "compiled": "yes" if is_compiled else "no",
        "threads": str(torch.get_num_threads()),
        "processes": str(ctx.world_size),
        "torch": torch.__version__,
    }
    starts_with_eot = data.train.n_documents > 1 or not has_lines
    return RunEnvironment(starts_with_eot, data.fingerprint, settings, np.packbits(seen).tobytes().hex())


def describe_resuming(trainer: Trainer, saved: Checkpoint) -> list[str]:
    """What a resumed run does otherwise than its checkpoint: other options or settings, another learning rate, nothing."""
    old, new, step, lines = saved.config, trainer.config, saved.state.step, []
    before, now = dataclasses.asdict(old), dataclasses.asdict(new)
    if step < new.train.steps:
        was, is_now = (get_lr_scale(max(step - 1, 0), c.train.steps, c.optim) * c.optim.lr for c in (old, new))
        if abs(is_now - was) > 0.01 * max(is_now, was):
            lines.append(f"the learning rate jumps from {was:.2g} to {is_now:.2g} at step {step}")
    options = [(section, key) for section in now if section != "run" for key in now[section]]
    pairs = {f"{section}.{key}": (before[section][key], now[section][key]) for section, key in options}
    if changed := [f"{name} {was!r} -> {value!r}" for name, (was, value) in pairs.items() if was != value]:
        lines.append(f"resumed with other options: {', '.join(changed)}")
    if step >= new.train.steps:
        lines.append(f"the run has done its {step} steps; continue with --train.steps N")
    then, today = saved.environment.settings, trainer.environment.settings
    if changed := [f"{key} {then[key]} -> {today[key]}" for key in today if then.get(key, today[key]) != today[key]]:
        lines.append(f"resumed with different settings; results may differ in the last bits: {', '.join(changed)}")
    return lines


def print_header(trainer: Trainer) -> None:
    """The first lines of output: what is trained, on what, where, and how."""
    if not trainer.ctx.is_main_process:
        return
    data, train, shape = trainer.data, trainer.config.train, trainer.model.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    now = trainer.environment.settings
    compiled = "compiled" if now["compiled"] == "yes" else "not compiled"
    start = f"from step {trainer.state.step} " if trainer.state.step else ""
    exports = "; exports with custom code (gpt2, qwen3, llama: without)" * (shape.preset == "glass")
    if shape.ngrams > 1 or {shape.norm, shape.positions, shape.mlp} != {"preset"}:
        exports = "; cannot be exported"
    n_documents, n_train, n_val = data.train.n_documents, len(data.train), len(data.val) - 1
    print_line(
        f"data    {data.name}: {n_documents:,} document{'s' * (n_documents != 1)}, {n_train:,} training tokens, {n_val:,} "
        f"held out ({n_val / (n_train + n_val):.1%}){data.how and ': '}{data.how}; {data.tokenizer.name} vocabulary of "
        f"{data.tokenizer.vocab_size:,}; {train.steps * train.batch_size * shape.context / n_train:.2f} epochs\n"
        f"model   {shape.description}; {parameters:,} parameters{exports}\n"
        f"device  {trainer.ctx.describe()}, {shape.attention} attention, {compiled}\n"
        f"run     {trainer.config.run.dir}: {start}to step {train.steps}, "
        f"{train.batch_size} x {shape.context} tokens per step"
    )
    # A Bible has 0.04, a book that ends in a licence 0.13.
    if not trainer.config.data.val and unlikeness(data.train, data.val, data.tokenizer.vocab_size) > 0.09:
        unlike = "the held-out text is unlike the rest (a licence at the end? a sorted list?), so its loss says little"
        print_line(f"{unlike}: remove it, shuffle the list, or name other text with --data.val")
    if trainer.config.log.attention == "off":
        print_line("log.attention is off: no attention is recorded and no page is written")
    if trainer.resumed_from:
        for line in describe_resuming(trainer, trainer.resumed_from):
            print_line(line)
