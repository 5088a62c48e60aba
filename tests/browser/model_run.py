"""The folder of a run with a random model, as training leaves it for the page."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from data.tokenizer import Tokenizer, train_tokenizer
from inspection.attention_file import AttentionFile
from inspection.page_builder import PageRun, write_page
from inspection.page_model import write_weights
from inspection.recorder import capture_texts
from model.gpt import GPT
from tests.browser import example_run
from tests.model.helpers import random_model

STEPS = (0, 10, 20)
TEXT = "One day Mia the fox met Tom the bear. Then Tom the bear met Mia the fox, and they ran. " * 3


def make_tokenizer(kind: str) -> Tokenizer:
    return train_tokenizer(kind, 300, [TEXT, "Ünder 字🌳!\n\t'll 12"])


def make_page(folder: Path, preset: str, kind: str) -> tuple[GPT, Tokenizer, dict[str, torch.Tensor]]:
    """Write `attention.html`; returns the model of the last step, its tokenizer, and the weights and means in the page."""
    run, model, tokenizer, saved = make_run(folder, preset, kind)
    entry = example_run.finding([1, 1], "antecedent.pronoun", 0.9, True, "It matters.")
    write_page(folder / "attention.html", [run], {"headline": "Head L1H1 matters.", "findings": [entry]}, None, "run")
    return model, tokenizer, saved


def make_run(folder: Path, preset: str, kind: str) -> tuple[PageRun, GPT, Tokenizer, dict[str, torch.Tensor]]:
    """A run with a model for each step."""
    tokenizer, files = make_tokenizer(kind), []
    checkpoint = folder / "checkpoints" / f"{STEPS[-1]:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "vocabulary.json").write_bytes(tokenizer.to_json())
    (checkpoint / "state.json").write_text(json.dumps({"environment": {"starts_with_eot": True}}))
    tokens = [tokenizer.end_of_text, *tokenizer.encode(TEXT).tolist()][:12]
    for step in STEPS:
        model = random_model(preset, seed=step, vocab_size=tokenizer.vocab_size, context=128)
        path = folder / "attention" / "weights" / f"{step:06d}.safetensors"
        write_weights(path, model, [tokens, tokens[::-1]], 16 if step == STEPS[-1] else 8)
        records = capture_texts(model, [("pronoun 1", tokens)], tokenizer.token_bytes, details=True)
        metadata = {"step": str(step), "config": json.dumps(asdict(model.config)), "vocab_size": str(model.vocab_size)}
        metadata["tokenizer_sha256"] = tokenizer.fingerprint()
        scores = {"antecedent.pronoun": np.full((model.config.n_layers, model.config.n_heads), 0.9, np.float32)}
        files.append(AttentionFile(records, metadata, scores))
    saved = {name: torch.from_numpy(array.astype(np.float32)) for name, array in load_file(path).items()}
    model.load_state_dict({name: saved.get(name, value) for name, value in model.state_dict().items()})
    model.tie_weights()
    return PageRun("run", files, (), folder), model, tokenizer, saved
