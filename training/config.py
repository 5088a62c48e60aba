"""RunConfig: everything that decides a run, composed from the dataclasses that stand beside the code they configure.

A config file is a saved command line: its entries become the same `--section.key value` arguments, ahead of those that
were typed. Defaults < file < command line. Free of torch, so that a mistyped option is answered at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import CHECKPOINT, CONFIG, UserError, escape_control_chars
from data.config import DataConfig
from model.config import ModelConfig
from training.cli import parse

MINUTES_DECIDE = (
    *(f"model.{name}" for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "context")),
    *(
        f"train.{name}"
        for name in ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_tokens", "save_every")
    ),
    *(
        f"optim.{name}"
        for name in ("lr", "muon_lr", "momentum", "warmup_steps", "schedule", "decay_fraction", "min_lr_ratio")
    ),
)
"""What `train.minutes` chooses (`training/time_budget.py`)."""
LONGEST = 100_000
"""Minutes that may be asked for: ten weeks."""
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.toml"


def at_least(section: str, settings: object, **limits: float) -> list[str]:
    """A line for each named value of `settings` that is below its limit."""
    return [
        f"{section}.{name} is {getattr(settings, name)}; it must be at least {limit}"
        for name, limit in limits.items()
        if not getattr(settings, name) >= limit
    ]


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives, and its seed."""

    dir: str = ""
    """Folder that the run writes; by default runs/ and the name of the config file or text, numbered if it exists."""
    resume: str = ""
    """A run folder to go on with, from its newest good checkpoint."""
    seed: int = 1
    """Decides the first weights, the order of the batches, dropout and samples."""
    threads: int = 0
    """Processor threads; 0 takes what torch takes, or fewer where that is faster."""
    stop_at_step: int = 0
    """SignalHandler once this step is done and saved, as after a signal; 0 goes on to the end."""
    dist_timeout: float = 600.0
    """Seconds that a process waits for the others before it gives the job up (torchrun)."""

    def problems(self) -> list[str]:
        found = at_least("run", self, seed=0, threads=0, stop_at_step=0, dist_timeout=1)
        if self.seed >= 1 << 63:
            found.append(f"run.seed is {self.seed}; it must be below 2**63")
        return found


@dataclass(frozen=True)
class OptimConfig:
    """How the weights follow the gradient."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for the matrices inside the blocks, AdamW for the rest; `adamw`: AdamW for all."""
    lr: float = 0.005
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    weight_decay: float = 0.1
    """Decay of matrices (not of gains and biases), in units of the learning rate."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.95
    """AdamW's memory of its square."""
    momentum: float = 0.95
    """Muon's memory of the gradient."""
    warmup_steps: int = 10
    """Steps over which the rate rises from zero to its peak."""
    schedule: Literal["linear", "cosine"] = "linear"
    """`linear`: stay at the peak, then fall in a line; `cosine`: fall along a half cosine."""
    decay_fraction: float = 0.5
    """Share of the steps over which `linear` falls."""
    min_lr_ratio: float = 0.0
    """Share of the peak at which the rate ends."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""

    def problems(self) -> list[str]:
        found = at_least("optim", self, lr=0, muon_lr=0, weight_decay=0, warmup_steps=0, grad_clip=0)
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"optim.{name} is {getattr(self, name)}; it must lie between 0 and 1")
        return found


@dataclass(frozen=True)
class TrainConfig:
    """How long and how often."""

    minutes: float = 0.0
    """Minutes that the whole command may take: model, batch, steps and rates are then chosen for this machine; 0 leaves
    them as they are."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """PackedSequences in a step, over all processes."""
    micro_batch_size: int = 0
    """PackedSequences that a process holds in memory at once; 0 takes its whole share of the step."""
    eval_every: int = 100
    """Steps between evaluations."""
    eval_tokens: int = 65_536
    """Validation tokens in an evaluation, the same every time; all of them when there are fewer."""
    save_every: int = 100
    """Steps between checkpoints; the best evaluation and the end are saved as well."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best."""
    patience: int = 0
    """SignalHandler after so many evaluations without a new best; 0 never does."""
    skip_nonfinite_steps: int = 0
    """Steps whose loss or gradient is not finite that a run may pass over before it stops; 0 stops at the first."""
    sharding: Literal["none", "fsdp"] = "none"
    """`none`: every process holds the whole model; `fsdp`: weights and moments are split among the processes."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the matrix products; `auto` takes bf16 where that is faster."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto` tries it where the run is long enough to earn it back, and keeps it if it is faster."""

    def problems(self) -> list[str]:
        found = [] if self.minutes < LONGEST else [f"train.minutes is {self.minutes}; it must be below {LONGEST:,}"]
        return found + at_least(
            "train",
            self,
            minutes=0,
            steps=1,
            batch_size=1,
            micro_batch_size=0,
            eval_every=1,
            eval_tokens=1,
            save_every=1,
            keep_checkpoints=1,
            patience=0,
            skip_nonfinite_steps=0,
        )


@dataclass(frozen=True)
class LogConfig:
    """What is told, and to whom."""

    every: int = 10
    """Steps between lines of metrics."""
    sample_tokens: int = 100
    """Length of the sample that is written at each evaluation; 0 writes none."""
    prompts: str = ""
    """A file of your own lines to watch: texts, or questions as prompt, right and wrong answer with tabs between."""
    attention: Literal["on", "off"] = "on"
    """`on`: record attention and head scores at each evaluation and write the page; `off`: train without."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; `offline` writes a run into the run folder for `wandb sync`."""
    wandb_project: str = "glassgpt"
    """Project that the run belongs to there."""

    def problems(self) -> list[str]:
        found = at_least("log", self, every=1, sample_tokens=0)
        if self.prompts and not os.path.isfile(self.prompts):
            found.append(f"log.prompts is {self.prompts!r}; there is no such file")
        return found


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def problems(self) -> list[str]:
        """What is wrong anywhere, a line each."""
        sections = (self.run, self.data, self.model, self.optim, self.train, self.log)
        return [line for section in sections for line in section.problems()]


def as_arguments(table: dict[str, Any], where: str) -> list[str]:
    """The entries of a TOML file or a checkpoint's config as `--section.key=value` arguments.

    Raises:
        UserError: for an entry that is neither a section nor a plain value.
    """
    arguments = []
    for section, entries in table.items():
        if not isinstance(entries, dict):
            raise UserError(
                f"{where}: {escape_control_chars(section)} stands outside a section; write it as [section] and key = value"
            )
        for key, value in entries.items():
            if isinstance(value, str) and "\0" in value:
                raise UserError(
                    f"{where}: {escape_control_chars(f'{section}.{key}')} holds a zero, which ends a word for the system"
                )
            if isinstance(value, (dict, list)):
                raise UserError(f"{where}: {escape_control_chars(f'{section}.{key}')} must be one plain value")
            arguments.append(f"--{section}.{key}={value}")
    return arguments


def read_toml(path: Path) -> list[str]:
    """The arguments that a config file saves.

    Raises:
        UserError: if it can't be read or is no TOML.
    """
    where = escape_control_chars(path)
    try:
        return as_arguments(tomllib.loads(path.read_text(encoding="utf-8")), where)
    except OSError as error:
        raise UserError(f"cannot read the config file {where}: {error.strerror}", CONFIG) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of 5,000 digits, nested too deeply
        raise UserError(f"{where} is no valid TOML: {escape_control_chars(error)}", CONFIG) from error


def to_toml(config: RunConfig) -> str:
    """The config as a file that `read_toml` reads back."""
    lines = []
    for section, entries in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        # A JSON string, or number, is a TOML one too; but for an infinite one.
        lines += [f"{k} = {v!r}" if isinstance(v, float) else f"{k} = {json.dumps(v)}" for k, v in entries.items()]
        lines.append("")
    return "\n".join(lines)


def from_saved(table: dict[str, Any], where: str) -> RunConfig:
    """The config that a checkpoint holds.

    Raises:
        UserError: if it holds none that this version understands (exit code 4).
    """
    try:
        return parse(RunConfig, as_arguments(table, where), "")
    except UserError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{where} holds no usable config ({escape_control_chars(first)})", CHECKPOINT) from error


def parse_train(argv: list[str]) -> tuple[RunConfig, str]:
    """The config of `train.py`'s command line, and a name for the run: its config file's, or its own text's.

    Raises:
        UserError: with a line for each problem.
    """
    typed = list(argv)
    file = Path(typed.pop(0)) if typed and not typed[0].startswith("-") else None
    resumed = [word for i, word in enumerate(typed) if i and typed[i - 1] in ("--run.resume",)]
    resumed += [word.split("=", 1)[1] for word in typed if word.startswith("--run.resume=")]
    if resumed:
        saved = Path(resumed[-1]) / "config.toml"
        if not os.path.isfile(saved):  # not Path.is_file, which raises for names that are too long
            raise UserError(
                f"{escape_control_chars(resumed[-1])} is no run folder: it has no config.toml; give one that train.py wrote",
                CHECKPOINT,
            )
        if file is not None:
            raise UserError(
                f"--run.resume brings its own config; leave out {escape_control_chars(file)}, or change single options"
            )
        file, typed = saved, [*typed, f"--run.dir={resumed[-1]}"]
    file = file or QUICKSTART
    description = (
        "Train a small GPT. The first argument may be a config file (default: configs/quickstart.toml). With "
        "--run.resume RUN --check nothing is trained further: it is proved that RUN resumes exactly. "
        "--plan prints what the run would take on this machine, --plan 8xh100 on others, and trains nothing."
    )
    saved_line = read_toml(file)
    config = parse(RunConfig, saved_line + typed, description)
    if config.train.minutes:
        refuse_two_plans(typed, saved_line, bool(resumed))
    if config.run.resume and not resumed:
        raise UserError(
            f"{escape_control_chars(file)} sets run.resume, which belongs on the command line: --run.resume RUN"
        )
    own_text = file == QUICKSTART and config.data.source != DataConfig().source
    name = re.sub(r"[^\w-]+", "-", Path(config.data.source).stem).strip("-") if own_text else file.stem
    return config, name or "run"


def refuse_two_plans(typed: list[str], saved_line: list[str], resuming: bool) -> None:
    """`train.minutes` beside what it decides itself.

    Args:
        typed: words of the command line.
        saved_line: those of the config file, whose values give way unless it names the minutes itself.

    Raises:
        UserError: naming what contradicts it.
    """
    if resuming:
        raise UserError("train.minutes plans a new run; on resuming, give --train.steps instead")
    named = [option.removeprefix("--").partition("=")[0] for option in typed]
    from_file = [option.removeprefix("--").partition("=")[0] for option in saved_line]
    if "train.minutes" in from_file:
        named += from_file
    both = [option for option in MINUTES_DECIDE if option in named]
    if both:
        raise UserError(f"train.minutes chooses {both[0]} itself; leave out one of the two")
