"""From a prompt to text: the generation that `sample.py` and the samples during training share."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

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
        UserError: if the vocabulary lacks a character of the prompt (exit code 2).
    """
    if documents:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    if prompt:
        return tokenizer.encode(prompt).tolist()
    has_newline = any(tokenizer.token_bytes(token) == b"\n" for token in range(min(tokenizer.vocab_size, 512)))
    return tokenizer.encode("\n").tolist() if has_newline else [tokenizer.end_of_text]


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    n_samples: int,
    seed: int,
    params: SamplingParams = DEFAULT_PARAMS,
) -> Iterator[list[str]]:
    """Yield, token by token, the new piece of each of `n_samples` continuations; '' after a text's end-of-text.

    A character spread over several tokens is yielded with the last of them.
    """
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    batch = torch.tensor(prompt, device=device).expand(n_samples, -1)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n_samples)]
    ended = [False] * n_samples
    for tokens in generate(model, batch, max_new_tokens, generator, params):
        pieces = []
        for i, token in enumerate(tokens.tolist()):
            if ended[i]:
                pieces.append("")
                continue
            ended[i] = token == tokenizer.end_of_text  # whose bytes are empty
            pieces.append(decoders[i].decode(tokenizer.token_bytes(token), final=ended[i]))
        yield pieces
        if all(ended):
            return
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def generate_tokens(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    seed: int,
    params: SamplingParams = DEFAULT_PARAMS,
) -> list[int]:
    """`prompt` and its continuation, up to and including the first new end-of-text."""
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(prompt)
    for (token,) in generate(model, torch.tensor([prompt], device=device), max_new_tokens, generator, params):
        tokens.append(int(token))
        if tokens[-1] == tokenizer.end_of_text:
            break
    return tokens


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of `tokens`; end-of-text is empty."""
    return b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace")


def check_prompt(prompt: str) -> None:
    """Raise `UserError` (exit code 2) for a prompt that is not valid UTF-8 on the command line."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8: invalid byte at character {error.start}") from error


def escape_text(text: str) -> str:
    """`text` with control characters escaped for the terminal, except line breaks and tabs."""
    return "".join(c if c in "\n\t" else escape_control_chars(c) for c in text)
