"""From a prompt to text: the generation that `sample.py`, `attend.py` and the samples during training share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from common.errors import UserError, escape_control_chars
from data.tokenizer import Tokenizer
from model.generate import SamplingParams, generate
from model.gpt import GPT

DEFAULT_PARAMS = SamplingParams(temperature=0.8)


def encode_prompt(tokenizer: Tokenizer, prompt: str, documents: bool) -> list[int]:
    """The tokens that generation starts from; never empty.

    Args:
        documents: whether the training documents began with end-of-text; then the prompt does too. In a model of one
            long text, for which end-of-text is out of distribution, an empty prompt becomes a line break if the
            vocabulary has one.

    Raises:
        UserError: if the prompt is not valid UTF-8, or the vocabulary lacks a character of it (exit code 2).
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8: invalid byte at character {error.start}") from error
    if documents:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    if prompt:
        return tokenizer.encode(prompt).tolist()
    has_newline = any(tokenizer.token_bytes(token) == b"\n" for token in range(min(tokenizer.vocab_size, 512)))
    return tokenizer.encode("\n").tolist() if has_newline else [tokenizer.end_of_text]


def generate_tokens(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    seed: int,
    params: SamplingParams = DEFAULT_PARAMS,
    n_samples: int = 1,
) -> Iterator[list[int]]:
    """Yield the next token of each of `n_samples` continuations of `prompt`, until all have reached end-of-text.

    A text that has reached it earlier continues with end-of-text, whose bytes are empty.
    """
    device, end_of_text = model.token_embedding.weight.device, tokenizer.end_of_text
    generator = torch.Generator(device).manual_seed(seed)
    has_ended = torch.zeros(n_samples, dtype=torch.bool)
    batch = torch.tensor(prompt, device=device).expand(n_samples, -1)
    for tokens in generate(model, batch, max_new_tokens, generator, params):
        tokens = tokens.cpu().masked_fill(has_ended, end_of_text)
        yield tokens.tolist()
        has_ended = tokens == end_of_text
        if has_ended.all():
            return


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of `tokens`; end-of-text is empty."""
    return b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace")


def escape_text(text: str) -> str:
    """`text` with control characters escaped for the terminal, except line breaks and tabs."""
    return "".join(c if c in "\n\t" else escape_control_chars(c) for c in text)
