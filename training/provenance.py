"""Where a dump comes from: enough to find, and check, the weights and the tokenizer that it was made with."""

from __future__ import annotations

import dataclasses
import json

from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.checkpoint import TrainState, sha256_of_weights


def provenance(model: GPT, tokenizer: Tokenizer, state: TrainState) -> dict[str, str]:
    """Step, tokens seen, shape and hashes, as the strings that a dump's metadata holds."""
    return {
        "config": json.dumps(dataclasses.asdict(model.config)),
        "vocab_size": str(model.vocab_size),
        "step": str(state.step),
        "tokens_seen": str(state.tokens_seen),
        "weights_sha256": sha256_of_weights(model),
        "tokenizer_sha256": tokenizer.fingerprint(),
    }
