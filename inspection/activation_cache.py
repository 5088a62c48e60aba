"""Attention as the model computed it: the weights of every layer and head while it reads a text.

First in the flow of inspection: model + tokens → `ActivationCache` → a file (`dump.py`), a terminal (`words.py`), a
picture (`figures.py`). Nothing is computed a second time: hooks stand where the explicit face makes its
weights and read the very tensors that the model goes on to use. Afterwards the model is as it was, and no
random generator has moved.

Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head width. A[l, h, i, j] is the
weight with which query i (row) reads key j (column); it is exactly 0 for j > i, and each row sums to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from inspection.attention_file import TOP_K
from model import functional
from model.gpt import GPT, Block

Watcher = Callable[[int, Tensor], None]
"""Called once for each layer: (layer, what that layer has just computed)."""
Comparer = Callable[[int, Tensor, Tensor], None]
"""Called once for each layer: (layer, queries, keys)."""


@dataclass(frozen=True)
class ActivationCache:
    """What one text looked like from inside. All tensors are on the CPU and share nothing with the model."""

    tokens: Int64[Tensor, " T"]
    pattern: Float32[Tensor, "L H T T"]
    """Attention weights A[l, h, i, j]."""
    value_norms: Float32[Tensor, "L H T"]
    """|v_j W_O| of each head: how much its reading of j can add to the residual stream. A weight on a short one moves
    little (Kobayashi et al. 2020, section 3.2: |f(x_j)|)."""
    loss: Float32[Tensor, " T-1"]
    """Nats: -log p of each token after the first, given those before it."""
    logits: Float32[Tensor, "T V"] | None = None
    queries: Float32[Tensor, "L H T D"] | None = None
    """As the scores use them: normalised and turned by their position where the preset does so."""
    keys: Float32[Tensor, "L H T D"] | None = None
    """Likewise; those that heads share are repeated for each of them."""
    values: Float32[Tensor, "L H T D"] | None = None
    attn_out: Float32[Tensor, "L T C"] | None = None
    """What the layer's attention, all heads together, adds to the residual stream."""
    top_tokens: Int64[Tensor, "T N"] | None = None
    """The likeliest next tokens, likeliest first; N is 5, or V where that is less."""
    top_probs: Float32[Tensor, "T N"] | None = None
    """Their probabilities."""


@contextmanager
def eager_attention(model: GPT) -> Iterator[None]:
    """Attention written out and dropout off while the body runs; every flag as it was afterwards."""
    attention = [cast(Block, block).attention for block in model.blocks]
    implementations = [module.attention_implementation for module in attention]
    training = [(module, module.training) for module in model.modules()]
    try:
        for module in attention:
            module.attention_implementation = "eager"
        model.eval()
        yield
    finally:
        for module, implementation in zip(attention, implementations, strict=True):
            module.attention_implementation = implementation
        for part, mode in training:
            part.training = mode  # one by one: model.train() would wake what was put to rest on purpose


def value_norms(values: Float[Tensor, "B H T D"], out: Float[Tensor, "C HD"]) -> Float[Tensor, "B H T"]:
    """|v_j W_O| of each head, whose part of the projection `out` is D of its columns (Kobayashi et al. 2020)."""
    heads = out.split(values.shape[-1], dim=1)
    # Head by head: all of them at once would hold (B, H, T, C) numbers.
    return torch.stack([(values[:, h] @ part.T).norm(dim=-1) for h, part in enumerate(heads)], dim=1)


def _after_weights(
    layer: int, on_weights: Watcher, on_scored: Comparer | None, module: object, args: tuple[Any, ...], out: Tensor
) -> None:
    if on_scored is not None:
        on_scored(layer, *args)
    on_weights(layer, out)


def _after_qkv(
    layer: int, heads: int, shared: int, on_values: Watcher, module: object, args: object, qkv: Tensor
) -> None:
    values = qkv.unflatten(-1, (heads + 2 * shared, -1))[..., heads + shared :, :].transpose(1, 2)
    on_values(layer, functional.repeat_kv(values, heads))


def _after_out(layer: int, on_projected: Watcher, module: object, args: object, out: Tensor) -> None:
    on_projected(layer, out)


@contextmanager
def hooks(
    model: GPT,
    on_weights: Watcher,
    on_values: Watcher | None = None,
    on_scored: Comparer | None = None,
    on_projected: Watcher | None = None,
) -> Iterator[None]:
    """Forward hooks in each layer while the body runs; see `observe`. The explicit face alone computes weights."""
    handles: list[Any] = []
    try:
        for layer, block in enumerate(model.blocks):
            attention = cast(Block, block).attention
            after_weights = partial(_after_weights, layer, on_weights, on_scored)
            handles.append(attention.pattern.register_forward_hook(after_weights))
            if on_values is not None:
                after_qkv = partial(_after_qkv, layer, attention.n_heads, attention.n_kv_heads, on_values)
                handles.append(attention.qkv.register_forward_hook(after_qkv))
            if on_projected is not None:
                handles.append(attention.out.register_forward_hook(partial(_after_out, layer, on_projected)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: GPT,
    tokens: Int[Tensor, "B T"],
    on_weights: Watcher,
    on_values: Watcher | None = None,
    on_scored: Comparer | None = None,
    on_projected: Watcher | None = None,
) -> Float32[Tensor, "B T V"]:
    """Read texts on the explicit face, in fp32 and without autograd, showing what each layer computes.

    The watchers get tensors on the model's device and should keep only what they need: all layers together
    are large.

    Args:
        tokens: B texts of one length; shorter ones padded on the right, which no earlier position can see.
        on_weights: gets (layer, attention weights (B, H, T, T)).
        on_values: gets (layer, values (B, H, T, D)), those of shared heads repeated.
        on_scored: gets (layer, queries, keys), (B, H, T, D) each, as the scores use them.
        on_projected: gets (layer, what the layer's attention adds to the residual stream (B, T, C)).

    Returns:
        Logits (B, T, V), on the model's device.

    Raises:
        ValueError: if the texts are empty, longer than the context, or hold a token unknown to the model.
    """
    T = tokens.shape[1]
    if not 1 <= T <= model.config.context:
        raise ValueError(f"{T} tokens; the model reads 1 to {model.config.context}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
        raise ValueError(f"a token lies outside the model's vocabulary of {model.vocab_size}")
    device = model.token_embedding.weight.device
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        eager_attention(model),
        hooks(model, on_weights, on_values, on_scored, on_projected),
    ):
        if all(p.dtype == torch.float32 for p in model.parameters()):
            return cast(Tensor, model(tokens.to(device)))
        in_fp32 = {name: p.float() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, in_fp32, (tokens.to(device),))


def pad(texts: Sequence[Sequence[int]]) -> Int64[Tensor, "B T"]:
    """Texts side by side, the shorter ones filled up on the right with token 0."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.long)


class _Kept:
    """What the layers show, cut to each text's own length and copied to the CPU."""

    def __init__(self, model: GPT, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.projections = [cast(Block, block).attention.out for block in model.blocks]
        self.texts: list[dict[str, Tensor]] = [{} for _ in lengths]

    def keep(self, name: str, along: tuple[int, ...], layer: int, seen: Tensor) -> None:
        """`seen` (B, ...); in the piece of each text, the dimensions `along` are positions."""
        for text, T, piece in zip(self.texts, self.lengths, seen, strict=True):
            for dimension in along:
                piece = piece.narrow(dimension, 0, T)
            if name not in text:
                text[name] = torch.empty(len(self.projections), *piece.shape)
            text[name][layer] = piece

    def weights(self, layer: int, weights: Float[Tensor, "B H T T"]) -> None:
        self.keep("pattern", (1, 2), layer, weights)

    def norms(self, layer: int, values: Float[Tensor, "B H T D"]) -> None:
        self.keep("value_norms", (1,), layer, value_norms(values, self.projections[layer].weight))

    def values(self, layer: int, values: Float[Tensor, "B H T D"]) -> None:
        self.norms(layer, values)
        self.keep("values", (1,), layer, values)

    def scored(self, layer: int, queries: Float[Tensor, "B H T D"], keys: Float[Tensor, "B H T D"]) -> None:
        self.keep("queries", (1,), layer, queries)
        self.keep("keys", (1,), layer, keys)

    def attn_out(self, layer: int, attn_out: Float[Tensor, "B T C"]) -> None:
        self.keep("attn_out", (0,), layer, attn_out)


def likeliest(logits: Float[Tensor, "T V"]) -> tuple[Int64[Tensor, "T N"], Float[Tensor, "T N"]]:
    """The likeliest next tokens at each position and their probabilities, likeliest first."""
    top_p, top = logits.softmax(dim=-1).topk(min(TOP_K, logits.shape[-1]))
    return top, top_p


def run_with_cache_batch(
    model: GPT, texts: Sequence[Sequence[int]], logits: bool = False, details: bool = False
) -> list[ActivationCache]:
    """`capture` for several texts of any lengths in one pass.

    Raises:
        ValueError: if there is no text, or one is empty or longer than the context.
    """
    if not texts or not all(texts):
        raise ValueError("no tokens; the model reads at least 1")
    tokens, kept = pad(texts), _Kept(model, [len(text) for text in texts])
    watchers = (kept.values, kept.scored, kept.attn_out) if details else (kept.norms,)
    scores = observe(model, tokens, kept.weights, *watchers).cpu()
    captures = []
    for k, (T, parts) in enumerate(zip(kept.lengths, kept.texts, strict=True)):
        loss = F.cross_entropy(scores[k, : T - 1], tokens[k, 1:T], reduction="none")
        if details:
            parts["top_tokens"], parts["top_probs"] = likeliest(scores[k, :T])
        whole = scores[k, :T].clone() if logits else None
        captures.append(ActivationCache(tokens[k, :T].clone(), loss=loss, logits=whole, **parts))
    return captures


def run_with_cache(
    model: GPT, tokens: Int[Tensor, " T"], logits: bool = False, details: bool = False
) -> ActivationCache:
    """Attention weights of every layer and head while `model` reads `tokens`.

    Args:
        tokens: 1 to `context` token ids, on any device.
        logits: keep the logits (T, V) too.
        details: keep queries, keys, values, what attention adds, and the likeliest next tokens too.

    Raises:
        ValueError: if the text is empty, longer than the context, or holds a token unknown to the model.
    """
    return run_with_cache_batch(model, [tokens.tolist()], logits, details)[0]
