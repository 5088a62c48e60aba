"""From a prompt to text: the generation that `sample.py`, `attend.py` and the samples during training share."""

import re
import sys
from collections.abc import Iterator

import torch

from common.errors import DISK_OR_MEMORY, UserError, escape_control_chars
from data.text_files import SEPARATOR
from data.tokenizer import Tokenizer
from model.generate import SamplingParams, generate
from model.gpt import GPT
from training.checkpoint import RunEnvironment

MAX_NEW_TOKENS = 100_000_000  # of all texts; their number takes memory, and more would take days
DEFAULT_PARAMS = SamplingParams(temperature=0.8)


def read_prompt(tokenizer: Tokenizer, prompt: str, trained: RunEnvironment) -> tuple[str, list[int]]:
    r"""The text that a prompt means, and the tokens that generation starts from; stderr says what differs.

    `<|endoftext|>` at the beginning is the start of a document. `\n` and `\t` are a line break and a tab unless the
    training text has backslashes. Spaces at the end, which belong to the next word's token, are dropped unless it has
    them alone. Tokens that it never had are named. Raises `UserError` as `encode_prompt` does.
    """
    text = prompt.removeprefix(SEPARATOR).replace("\r\n", "\n").replace("\r", "\n")  # as the training text was read
    seen = {tokenizer.end_of_text, *filter(trained.has_token, range(tokenizer.vocab_size))}
    if re.search(r"\\[nt]", text) and not any(b"\\" in tokenizer.token_bytes(token) for token in seen):
        text = text.replace("\\n", "\n").replace("\\t", "\t")
        print(r"note: \n and \t in the prompt are read as a line break and a tab", file=sys.stderr)
    if text.endswith(" ") and int(tokenizer.encode(text)[-1]) not in seen:
        text = text.rstrip(" ")
        print(
            "note: spaces at the end of the prompt are dropped; they belong to the next word's token", file=sys.stderr
        )
    tokens = encode_prompt(tokenizer, text, trained.starts_with_eot)
    if unseen := [token for token in dict.fromkeys(tokens) if token not in seen]:
        words = [tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in unseen[:8]]
        shown = ", ".join(f'"{escape_control_chars(word)}"' for word in words)
        print(f"note: the training text never had these tokens of the prompt: {shown}", file=sys.stderr)
    return text, tokens


def encode_prompt(tokenizer: Tokenizer, prompt: str, documents: bool) -> list[int]:
    """The tokens that generation starts from; never empty.

    Args:
        documents: whether the training documents began with end-of-text; then the prompt does too. In a model of one
            long text, for which end-of-text is out of distribution, an empty prompt becomes a line break.

    Raises:
        UserError: if the prompt is not valid UTF-8, or the vocabulary lacks a character of it (exit code 2).
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8: invalid byte at character {error.start}") from error
    if documents:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    return tokenizer.encode(prompt or "\n").tolist()  # it has lines: else its documents begin with end-of-text


def check_token_count(n_samples: int, max_new_tokens: int) -> None:
    """Raise `UserError` (6) for more than `MAX_NEW_TOKENS` in all."""
    if (total := n_samples * max_new_tokens) > MAX_NEW_TOKENS:
        raise UserError(f"{total:,} tokens are too many: ask for at most {MAX_NEW_TOKENS:,} at once", DISK_OR_MEMORY)


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
    generator = torch.Generator().manual_seed(seed)  # on the CPU: not every device has float64, which sampling needs
    has_ended = torch.zeros(n_samples, dtype=torch.bool)
    batch = torch.tensor(prompt, device=device).expand(n_samples, -1)
    for tokens in generate(model, batch, max_new_tokens, generator, params):
        tokens = tokens.cpu().masked_fill(has_ended, end_of_text)
        yield tokens.tolist()
        has_ended = tokens == end_of_text
        if has_ended.all():
            return


def escape_text(text: str) -> str:
    """`text` for a terminal: without the CR of CRLF, and with escapes for what could steer it but line breaks and tabs."""
    return escape_control_chars(re.sub(r"\r+(?=\n|\Z)", "", text), keep="\n\t")
