"""Models that were not trained here: a Hugging Face folder, or a name on its hub, as a checkpoint; and `--model.init`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from torch import Tensor

from common.errors import CHECKPOINT, UserError, escape_control_chars
from data.tokenizer import Tokenizer, load_huggingface_tokenizer
from model.config import ModelConfig
from model.gpt import GPT
from model.huggingface import CONFIG_FILE, load_huggingface, read_huggingface_config
from training.checkpoint import Checkpoint, RunEnvironment, TrainState, model_weights, open_checkpoint
from training.config import RunConfig, option_names

HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
MAX_CONTEXT, BATCH_SIZE = 256, 8
"""Of a pretrained model that is fine-tuned, unless options say otherwise: what two CPU cores can do."""
LR = 1e-4  # of AdamW, for a pretrained model
LR_RATIO = 0.3  # of the learning rates of a run, when it is continued on another text


class PretrainedModel(Checkpoint):
    """The model of a Hugging Face folder; there is no run, so the step is 0 and the training text is unknown."""

    def weights(self) -> dict[str, Tensor]:
        return model_weights(load_huggingface(self.folder))

    def tokenizer(self) -> Tokenizer:
        return load_huggingface_tokenizer(self.folder, self.vocab_size)

    @property
    def run_dir(self) -> Path:
        """The folder itself, or runs/NAME for one in the hub's cache, models--NAME/snapshots/REVISION."""
        is_cached = self.folder.parent.name == "snapshots"
        return Path("runs") / self.folder.parents[1].name.removeprefix("models--") if is_cached else self.folder


def open_model(path: str | Path, which: str = "best") -> Checkpoint:
    """The model that `path` names: a checkpoint, a run's checkpoint `which`, a Hugging Face folder, or a name on the hub.

    Raises UserError: there is no such checkpoint (exit code 2), model or network, or it is damaged (4).
    """
    name, folder = str(path), Path(path)
    if not os.path.exists(folder) and HUB_NAME.fullmatch(name) and not os.path.isdir(name.split("/")[0]):
        folder = find_on_hub(name)
    if not os.path.isfile(folder / CONFIG_FILE):
        return open_checkpoint(folder, which)
    shape, vocab_size = read_huggingface_config(folder)
    return PretrainedModel(folder, RunConfig(model=shape), vocab_size, TrainState(), RunEnvironment(False))


def find_on_hub(name: str) -> Path:
    """The folder of a model in Hugging Face's cache, downloaded if it is not there. Raises UserError (4)."""
    what = f"there is no folder {name}, and the model of that name"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        message = f"{what} is fetched with huggingface-hub: pip install huggingface-hub"
        raise UserError(message, CHECKPOINT) from error
    for is_offline in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES), local_files_only=is_offline))
        except Exception as error:  # of httpx and of the hub, which has a dozen kinds
            reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
        else:
            if (folder / CONFIG_FILE).is_file():
                return folder
            reason = f"it has no {CONFIG_FILE}"
    message = f"{what} cannot be fetched from the hub ({reason}); check the name, or copy the folder of the model here"
    raise UserError(message, CHECKPOINT)


def init_options(config: RunConfig, typed: list[str]) -> list[str]:
    """The options that `--model.init` decides unless they are typed: shape, tokenizer, and lower learning rates.

    Raises UserError: a typed option contradicts the model (exit code 2), or as `open_model`.
    """
    source = open_model(config.model.init)
    shape, optim = source.config.model, source.config.optim
    values = {f"model.{name}": value for name, value in dataclasses.asdict(shape).items()}
    for name in ("init", "dropout", "attention", "context"):
        del values[f"model.{name}"]
    if fixed := sorted({*values, "data.tokenizer"} & option_names(typed)):
        raise UserError(f"--{fixed[0]} is that of --model.init {config.model.init}; leave it out")
    values |= {"data.tokenizer": source.folder, "model.context": shape.context}
    values |= {"optim.optimizer": optim.optimizer, "optim.weight_decay": 0.1}
    values |= {"optim.lr": LR_RATIO * optim.lr, "optim.muon_lr": LR_RATIO * optim.muon_lr}
    if isinstance(source, PretrainedModel):
        values |= {"model.context": min(shape.context, MAX_CONTEXT), "train.batch_size": BATCH_SIZE}
        values |= {"data.vocab_size": source.vocab_size, "optim.optimizer": "adamw", "optim.lr": LR}
    return [f"--{name}={value}" for name, value in values.items()]


def describe_init(config: RunConfig) -> str:
    optim, muon = config.optim, f" and {config.optim.muon_lr:.2g}" if config.optim.optimizer == "muon" else ""
    return (
        f"init    {escape_control_chars(config.model.init)}: {config.model.preset} with its tokenizer; "
        f"{optim.optimizer} at {optim.lr:.2g}{muon}, lower than for training from random weights; "
        f"context {config.model.context}"
    )


def initial_model(shape: ModelConfig, tokenizer: Tokenizer) -> GPT:
    """The model of `shape.init` with the attention implementation, dropout and context of `shape`.

    Raises UserError: the context is longer than the model's, or the tokenizer is another one (exit code 2), or as `open_model`.
    """
    source = open_model(shape.init)
    if shape.context > (most := source.config.model.context):
        raise UserError(f"model.context is {shape.context}; that of --model.init {shape.init} is {most}")
    if tokenizer.fingerprint() != source.tokenizer().fingerprint():
        raise UserError(f"data.tokenizer is not the tokenizer of --model.init {shape.init}; leave it out")
    own = dataclasses.replace(source.config.model, init=shape.init, context=shape.context, dropout=shape.dropout)
    if dataclasses.replace(own, attention=shape.attention) != shape:
        raise UserError(
            f"--model.init {shape.init} has another shape than this config: leave out the options of its shape"
        )
    return source.build_model(shape)
