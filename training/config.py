"""RunConfig: all settings of a run, in sections; those of data and model are defined next to their code.

The entries of a config file become the same `--section.key=value` arguments as those on the command line, and come
before them: defaults < file < command line. Imports no torch, so that a mistyped option is answered at once.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import ranges
from common.errors import CHECKPOINT, UserError, quote_arg
from data.config import DataConfig
from model.config import ModelConfig
from training.cli import field_name, parse, split_options

MAX_CONFIG_CHARS = 1 << 14  # the memory that dotted keys take grows with their square
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.toml"


@dataclass(frozen=True)
class RunSettings:
    """Run folder, seed and processes."""

    dir: str = ""  # Run folder, new or empty; by default runs/ and the name of the config or text, perhaps numbered.
    resume: str = ""  # A run folder to continue from its newest intact checkpoint.
    seed: ranges.Count = 1  # Seed of the initial weights, the order of the batches, dropout and samples.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # `auto`: a CUDA GPU if there is one, else the CPU.
    threads: ranges.NonNegativeInt = 0  # CPU threads; 0: torch's default.
    stop_at_step: ranges.NonNegativeInt = 0  # Save and stop after this step, as after a signal; 0: train to the end.
    dist_timeout: ranges.Seconds = 600.0  # Seconds that a process of torchrun waits for the others before it exits.


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    optimizer: Literal["muon", "adamw"] = "muon"  # `muon`: for the matrices of the blocks, with AdamW for the rest.
    lr: ranges.NonNegativeFloat = 0.005  # Peak learning rate of AdamW.
    muon_lr: ranges.NonNegativeFloat = 0.02  # Peak learning rate of Muon.
    weight_decay: ranges.NonNegativeFloat = 0.1  # Weight decay of matrices and embeddings, not of norms and biases.
    beta1: ranges.BelowOne = 0.9  # AdamW beta1.
    beta2: ranges.BelowOne = 0.95  # AdamW beta2.
    momentum: ranges.BelowOne = 0.95  # Muon momentum.
    warmup_steps: ranges.NonNegativeInt = 10  # Steps of linear warmup.
    schedule: Literal["linear", "cosine"] = "linear"  # `linear`: constant, then linear decay; `cosine`: cosine decay.
    decay_fraction: ranges.Fraction = 0.5  # Fraction of the steps over which `linear` decays.
    decay_at: ranges.StepList = ""  # Steps at which `linear` falls by equal parts, as train.minutes writes it.
    min_lr_ratio: ranges.Fraction = 0.0  # Final learning rate as a fraction of the peak.
    grad_clip: ranges.NonNegativeFloat = 1.0  # Maximum norm of the gradient; 0: no clipping.


@dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    minutes: ranges.Minutes = 0.0  # Time of the whole command; what is not given is chosen for it. 0: `steps` decides.
    steps: ranges.PositiveInt = 1000  # Optimizer steps.
    batch_size: ranges.PositiveInt = 16  # Sequences in a step, over all processes.
    micro_batch_size: ranges.NonNegativeInt = 0  # Sequences of a process in one pass; 0: all of its part of the batch.
    eval_every: ranges.PositiveInt = 100  # Steps between evaluations.
    eval_tokens: ranges.PositiveInt = 65_536  # Validation tokens of an evaluation, the same every time.
    save_every: ranges.PositiveInt = 100  # Steps between checkpoints; the best and the last step are saved as well.
    keep_checkpoints: ranges.PositiveInt = 2  # How many of the newest checkpoints are kept, besides the best.
    patience: ranges.Patience = -1  # Evaluations without improvement to the end; 0: any number; -1: 5 on your own text.
    skip_nonfinite_steps: ranges.NonNegativeInt = 0  # Steps with a non-finite loss or gradient to skip before stopping.
    sharding: Literal["none", "fsdp"] = "none"  # `none`: DDP; `fsdp`: parameters and optimizer state are sharded.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # Of matrix products; `auto`: a 16-bit one where fast.
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; `auto`: for long runs if a compiler is installed.


@dataclass(frozen=True)
class LogConfig:
    """Logging, samples and inspection."""

    every: ranges.PositiveInt = 10  # Steps between log lines.
    sample_tokens: ranges.NonNegativeInt = 100  # Tokens of the text sample at each evaluation; 0: none.
    prompts: str = ""  # A file of prompts to monitor: texts, or prompt, right and wrong answer separated by tabs.
    attention: Literal["on", "off"] = "on"  # Record attention and head scores at each evaluation and write the page.
    tensorboard: Literal["on", "off"] = "off"  # Event files for TensorBoard in the run folder.
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases; `offline`: for `wandb sync`.
    wandb_project: str = ""  # Weights & Biases project; by default WANDB_PROJECT of the environment, else glassgpt.


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def problems(self) -> list[str]:
        found = self.data.problems() + self.model.problems()
        for section in ("run", "optim", "train", "log"):
            found += ranges.out_of_range(getattr(self, section), f"{section}.")
        return found


def as_arguments(table: dict[str, Any], where: str) -> list[str]:
    """The entries of a TOML file or a checkpoint's config as `--section.key=value` arguments; raises UserError (2)."""
    arguments = []
    for section, entries in table.items():
        if not isinstance(entries, dict):
            raise UserError(f"{where}: {section} is outside of a section; write [section] and key = value")
        for key, value in entries.items():
            if isinstance(value, (dict, list)) or "\0" in str(value):
                raise UserError(f"{where}: {section}.{key} must be a number or plain text")
            arguments.append(f"--{section}.{key}={value}")
    return arguments


def read_toml(path: Path) -> list[str]:
    """The arguments of a config file; raises UserError (2) if it cannot be read or is not valid TOML."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read(MAX_CONFIG_CHARS + 1)
        if len(text) > MAX_CONFIG_CHARS:
            raise UserError(f"{path} is too long for a config file: more than {MAX_CONFIG_CHARS:,} characters")
        if "\0" in text:
            raise UserError(f"{path} is no text in UTF-8; save it as UTF-8")
        return as_arguments(tomllib.loads(text), str(path))
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"cannot read the config file {path}: {error.strerror}{hint}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits, nested too deeply
        raise UserError(f"{path} is not valid TOML: {error}") from error


def to_toml(config: RunConfig) -> str:
    """The config as a file that `read_toml` reads back; encode it with `surrogateescape`, for names that are not UTF-8."""
    lines = []
    for section, entries in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        lines.append("")
    return "\n".join(lines).replace("\x7f", "\\u007f")  # else JSON's finite numbers and texts are TOML's


def parse_train(argv: list[str], description: str = "") -> tuple[RunConfig, str]:
    """The config of `train.py`'s command line, and a name for the run: its config file's, or its own text's. Raises
    UserError with a line for each problem (2), or for a folder that is not a run (4)."""
    typed = name_source(argv)
    file = Path(typed.pop(0)) if typed and typed[0].endswith(".toml") and not typed[0].startswith("-") else None
    options = dict(split_options(typed))
    resumed = options.get("--run.resume")
    if resumed == "":
        raise UserError("--run.resume is empty: name a run folder")
    if resumed:
        resumed = run_of(os.path.expanduser(resumed))
        if os.path.realpath(os.path.expanduser(options.get("--run.dir") or resumed)) != os.path.realpath(resumed):
            raise UserError(
                f"--run.resume continues in {resumed}: leave out --run.dir, or resume a copy of that folder"
            )
        saved = Path(resumed) / "config.toml"
        if file is not None:
            raise UserError(f"--run.resume uses the config of that run; leave out {file}, or give single options")
        file, typed = saved, [*typed, f"--run.resume={resumed}", f"--run.dir={resumed}"]
    if "train.steps" in option_names(typed):  # another end: `decay_at` of a file leads to the old one
        typed = ["--optim.decay_at=", *typed]
    file = file or QUICKSTART
    from_file = read_toml(file)
    config = parse(RunConfig, from_file + typed, description)
    # Not in `problems`: a checkpoint may be read elsewhere.
    if config.log.prompts and not resumed and not os.path.isfile(config.log.prompts):
        raise UserError(f"log.prompts is {config.log.prompts!r}; there is no such file")
    if config.run.threads > (cores := os.cpu_count() or 1):
        raise UserError(f"run.threads is {config.run.threads}; it must be at most {cores}, the cores of this machine")
    if all(os.path.exists(os.path.join(config.data.source, name)) for name in ("config.toml", "checkpoints")):
        run = quote_arg(config.data.source)
        raise UserError(f"{run} is a run, not a text: continue it with --run.resume {run}")
    if config.train.minutes:
        check_minutes(typed, from_file, bool(resumed))
    if config.run.resume and not resumed:
        raise UserError(f"{file} sets run.resume, which belongs on the command line: --run.resume RUN")
    is_own_text = file == QUICKSTART and config.data.source != DataConfig().source
    return config, (text_name(config.data.source) if is_own_text else file.stem) or "run"


def run_of(path: str) -> str:
    """The run folder `path`, or the run whose newest checkpoint it is. Raises UserError (4) if it is neither."""
    if os.path.isfile(os.path.join(path, "config.toml")):  # not Path.is_file, which raises for names that are too long
        return path
    folder, problem = Path(os.path.abspath(path)), f"{path} is not a run folder: it has no config.toml"
    if folder.parent.name == "checkpoints" and folder.name.isdecimal() and os.path.isdir(folder):
        steps = [int(name) for name in os.listdir(folder.parent) if name.isdecimal()]
        if int(folder.name) == max(steps):
            return str(folder.parents[1])
        problem = f"{path} is not the newest checkpoint of its run, the one that is resumed (step {max(steps)}); to go "
        problem += f"back, move the later ones out of {folder.parent}"
    raise UserError(problem, CHECKPOINT)


def name_source(argv: list[str]) -> list[str]:
    """The command line with a first word that is not a config file as `--data.source`."""
    if argv and not re.match(r"-|\w+\.\w+=|.*\.toml\Z", argv[0], re.DOTALL):
        return [f"--data.source={argv[0]}", *argv[1:]]
    return list(argv)


def text_name(source: str) -> str:
    """A name for the run of a text: the file's, or that of the folder, also of a pattern's."""
    path = Path(os.path.expanduser(source))
    while glob.has_magic(str(path)) and not os.path.exists(path):
        path = path.parent
    name = os.path.basename(os.path.realpath(path)) if os.path.isdir(path) else path.stem
    return re.sub(r"[\0-,./:-@\[-^`{-\x9f\s\ud800-\udfff]+", "-", name)[:60].strip("-")


def check_minutes(typed: list[str], from_file: list[str], resuming: bool) -> None:
    """Raise UserError for `train.minutes` with `train.steps`, unless typed minutes replace a file's steps."""
    if resuming:
        raise UserError("train.minutes is for a new run; to resume, give --train.steps instead")
    if "train.steps" in option_names(typed if "train.minutes" in option_names(typed) else from_file + typed):
        raise UserError("train.minutes and train.steps both say how long to train; leave out one of them")


def option_names(words: list[str]) -> set[str]:
    """The options in a list of arguments, such as `train.steps`."""
    return {field_name(option) for option, _ in split_options(words) if option}


def given_options(argv: list[str]) -> set[str]:
    """The options that `train.py`'s command line decides: those that are typed, and those of its config file."""
    has_file = bool(argv) and not argv[0].startswith("-")
    return option_names([*read_toml(Path(argv[0])), *argv[1:]] if has_file else argv)


def replace_options(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with some options replaced, such as `{"model.d_model": 64}`."""
    sections: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        section, _, name = option.partition(".")
        sections.setdefault(section, {})[name] = value
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()})
