"""From a command line to a dataclass, or to one line for each mistake.

Every option and value is checked here, so that all problems are reported at once and with the nearest right name; tyro
then builds the dataclass and prints the help. Imports no torch: a mistake is answered within a fraction of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypeVar

import tyro

from common.errors import CONFIG, UserError, escape_control_chars

ALIASES = {
    alias: option
    for option, aliases in {
        "model.context": "block_size n_ctx max_seq_length max_position_embeddings seq_len",
        "model.d_model": "n_embd hidden_size dim embed_dim",
        "model.n_layers": "n_layer num_hidden_layers num_layers depth",
        "model.n_heads": "n_head num_attention_heads num_heads",
        "model.n_kv_heads": "num_key_value_heads n_query_groups",
        "model.d_head": "head_dim head_size",
        "model.d_mlp": "intermediate_size n_inner",
        "model.attention": "attn_implementation flash_attention",
        "model.preset": "model_type model_name arch",
        "data.source": "dataset dataset_name data_dir train_file data input",
        "run.dir": "out_dir output_dir",
        "run.resume": "init_from resume_from_checkpoint checkpoint",
        "run.threads": "num_threads n_threads",
        "optim.lr": "learning_rate max_lr",
        "optim.min_lr_ratio": "min_lr final_lr_frac",
        "optim.warmup_steps": "warmup_iters lr_warmup_steps warmup_ratio warmup",
        "optim.schedule": "decay_lr lr_scheduler_type scheduler",
        "optim.decay_fraction": "lr_decay_iters warmdown_ratio",
        "optim.grad_clip": "max_grad_norm max_norm clip_grad_norm clip",
        "optim.beta1": "adam_beta1",
        "optim.beta2": "adam_beta2",
        "optim.optimizer": "optim",
        "train.steps": "max_iters max_steps num_iterations",
        "train.batch_size": "per_device_train_batch_size global_batch_size total_batch_size",
        "train.micro_batch_size": "gradient_accumulation_steps device_batch_size",
        "train.eval_every": "eval_interval eval_steps interval",
        "train.eval_tokens": "eval_iters max_eval_samples",
        "train.save_every": "save_interval save_steps checkpoint_interval",
        "train.keep_checkpoints": "save_total_limit always_save_checkpoint",
        "train.dtype": "bf16 fp16 precision",
        "train.compile": "torch_compile compile_model",
        "train.sharding": "fsdp strategy",
        "log.every": "log_interval logging_steps",
        "log.wandb": "wandb_log report_to",
        "tokens": "max_new_tokens max_tokens length",
        "samples": "num_samples num_return_sequences",
        "prompt": "start",
    }.items()
    for alias in aliases.split()
}
"""Options of nanoGPT, Hugging Face's Trainer, litgpt and nanochat, by their last part, and ours for the same thing."""
NO_EQUIVALENT = {
    "device": "a CUDA GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES= in the environment",
    "devices": "start several processes with torchrun --nproc_per_node=N train.py ...",
    "backend": "it is nccl with CUDA and gloo without",
    "num_train_epochs": "give --train.steps; an epoch is the training tokens / (train.batch_size * model.context) steps",
    "eval_only": "a run evaluates by itself; to look at a trained one use sample.py and attend.py",
    "bias": "model.preset decides: gpt2 has biases, glass and qwen3 have none",
    "gradient_checkpointing": "lower --train.micro_batch_size, or take --model.attention chunked",
    "wandb_run_name": "it is the name of the run folder, --run.dir",
}
NO_EQUIVALENT["epochs"] = NO_EQUIVALENT["num_epochs"] = NO_EQUIVALENT["num_train_epochs"]


class Settings(Protocol):
    """A dataclass that can check its own values."""

    def problems(self) -> list[str]: ...


S = TypeVar("S", bound=Settings)


def parse(settings: type[S], args: list[str], description: str, positional: str | None = None) -> S:
    """The settings that `args` describe.

    Args:
        settings: a dataclass, perhaps of dataclasses, with a method `problems()`.
        positional: the one field that is given without an option name.

    Raises:
        UserError: with a line for each problem (exit code 2).
        SystemExit: after `--help`.
    """
    if "--help" in args or "-h" in args:
        tyro.cli(settings, args=["--help"], description=description)
    types = {name: kind for name, kind in option_types(settings).items() if name != positional}
    wrong: list[str] = []
    good: list[str] = []
    words = 0
    for option, value in split_options(args, [name for name, kind in types.items() if kind is bool]):
        if option:
            problem = option_problem(option, value, types)
        else:
            words += 1
            problem = None if positional and words == 1 else f"unexpected {value!r}; options begin with two dashes"
        if problem:
            wrong.append(problem)
        else:
            good.append(str(value) if not option else option if value is None else f"{option}={value}")
    if positional and not words:
        wrong.append(f"{positional} is missing; --help shows the usage")
        good.insert(0, ".")
    parsed = _run_tyro(settings, good)
    wrong += [f"cannot use {' '.join(good)}"] if parsed is None else parsed.problems()
    if wrong or parsed is None:
        raise UserError("\n".join(wrong), CONFIG)
    return parsed


def _run_tyro(settings: type[S], args: list[str]) -> S | None:
    """The parsed settings, or None where tyro refuses them."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return tyro.cli(settings, args=args)
    except SystemExit:
        return None


def option_types(settings: type, prefix: str = "") -> dict[str, Any]:
    """Every option of a (nested) dataclass, such as `model.n_layers`, with the type of its value."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            types |= option_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            types[prefix + name] = kind
    return types


def split_options(args: list[str], flags: Collection[str] = ()) -> Iterator[tuple[str, str | None]]:
    """(option, value) pairs: the option with its dashes, or '' for a word on its own; a missing value is None.

    Args:
        flags: options without a value: the word after one is not its value.
    """
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield "", word
        elif "=" in word:
            option, value = word.split("=", 1)
            yield option, value
        else:
            alone = field_name(word) in flags or not rest or rest[0].startswith("--")
            yield word, None if alone else rest.pop(0)


def option_problem(option: str, value: str | None, types: dict[str, Any]) -> str | None:
    """What is wrong with an option's name or value, in one line, or None."""
    name = field_name(option)
    if name not in types:
        return f"unknown option {escape_control_chars(option)}; {_suggestion(name, types)}"
    kind = types[name]
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    expected = {int: "a whole number", float: "a number", bool: "no value"}.get(kind, "a value")
    if choices:
        expected = "one of " + ", ".join(choices)
    if value is None:
        return None if kind is bool else f"{option} needs a value: {expected}"
    if kind in (int, float):
        try:
            kind(value)
            return None
        except ValueError:
            return f"{option} is {value!r}; it takes {expected}"
    if kind is bool or (choices and value not in choices):
        nearest = difflib.get_close_matches(value, choices, n=1)
        return f"{option} is {value!r}; it takes {expected}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    return None


def _suggestion(name: str, types: dict[str, Any]) -> str:
    """What to type instead of an unknown option: the alias, the option with that last part, or the nearest name."""
    last = name.rsplit(".", 1)[-1]
    candidates = [ALIASES.get(last, "")]
    candidates += [key for key in types if key.rsplit(".", 1)[-1] == last]
    if last in NO_EQUIVALENT and "train.steps" in types:
        return f"there is none like it: {NO_EQUIVALENT[last]}"
    candidates += difflib.get_close_matches(name, types, n=1, cutoff=0.5)
    nearest = next((key for key in candidates if key in types), None)
    return f"did you mean --{nearest}?" if nearest else "--help lists the options"


def field_name(option: str) -> str:
    """`--top-k` as the field `top_k`."""
    return option.removeprefix("--").replace("-", "_")
