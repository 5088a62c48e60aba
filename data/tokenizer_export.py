"""Our tokenizers as the files of a Hugging Face folder: `tokenizer.json` and `tokenizer_config.json`."""

from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing

from data.tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer, gpt2_byte_decoder

END_OF_TEXT = "<|endoftext|>"


def to_tokenizer_json(tokenizer: Tokenizer, starts_with_eot: bool = False) -> str:
    """The content of `tokenizer.json`, with the same ids for the same text; with `starts_with_eot`, end-of-text before each.

    There is one difference: `<|endoftext|>` within a text becomes the end-of-text token, as in all of transformers. A
    character that a `char` vocabulary lacks is left out.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return str(tokenizer.saved["tokenizer"])
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        exported = HFTokenizer(models.BPE({**vocab, END_OF_TEXT: tokenizer.end_of_text}, []))
        exported.decoder = decoders.Fuse()
    else:
        exported = _byte_level(tokenizer)
    exported.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if starts_with_eot:
        exported.post_processor = TemplateProcessing(
            single=f"{END_OF_TEXT} $A",
            pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
            special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)],
        )
    return str(exported.to_str(pretty=True))


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    end = END_OF_TEXT
    if isinstance(tokenizer, HuggingFaceTokenizer):
        end = str(HFTokenizer.from_str(to_tokenizer_json(tokenizer)).id_to_token(tokenizer.end_of_text))
    tokens = {"bos_token": end, "eos_token": end, "clean_up_tokenization_spaces": False}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "model_max_length": context}


def _byte_level(tokenizer: Tokenizer) -> HFTokenizer:
    """A byte-level BPE: each token is written with GPT-2's visible characters for bytes."""
    character_of = {byte: character for character, byte in gpt2_byte_decoder().items()}
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)}
    names = {token: "".join(character_of[byte] for byte in token) for token in ranks}
    parts = [split_token(token, ranks) for token in ranks if len(token) > 1]  # in the order of their ids
    vocab = {names[token]: i for token, i in ranks.items()}
    vocab[END_OF_TEXT] = tokenizer.end_of_text
    used = set(vocab.values())
    vocab |= {f"<|unused {i}|>": i for i in range(tokenizer.vocab_size) if i not in used}
    merges = [(names[left], names[right]) for left, right in parts]
    # As tiktoken does: a word that is a token is that token, whatever the merges say.
    exported = HFTokenizer(models.BPE(vocab, merges, ignore_merges=isinstance(tokenizer, BPETokenizer)))
    pattern = tokenizer.pattern if isinstance(tokenizer, BPETokenizer) else ""
    exported.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2_PATTERN)
    if pattern not in ("", GPT2_PATTERN):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        exported.pre_tokenizer = pre_tokenizers.Sequence([split, exported.pre_tokenizer])
    exported.decoder = decoders.ByteLevel()
    return exported


def split_token(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are merged to this one: what byte-pair encoding makes of its bytes with the tokens before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = min(range(len(merged)), key=merged.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
