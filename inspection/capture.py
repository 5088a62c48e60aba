"""Attention as the model computed it: the weights of every layer and head while it reads a text.

First in the flow of inspection: model + tokens → `Capture` → a file (`dump.py`), a terminal (`words.py`), a
picture (`figures.py`). Nothing is computed a second time: hooks stand where the explicit face makes its
weights and read the very tensors that the model goes on to use. Afterwards the model is as it was, and no
random generator has moved.

Shapes: B texts, L layers, H heads, T positions, V vocabulary, D head width. A[l, h, i, j] is the weight with
which query i (row) reads key j (column); it is exactly 0 for j > i, and each row sums to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from model import ops
from model.gpt import GPT, Block

Watcher = Callable[[int, Tensor], None]
"""Called once for each layer: (layer, what that layer has just computed)."""


@dataclass(frozen=True)
class Capture:
    """What one text looked like from inside. All tensors are on the CPU and share nothing with the model."""

    tokens: Int64[Tensor, " T"]
    pattern: Float32[Tensor, "L H T T"]
    """Attention weights A[l, h, i, j]."""
    value_norms: Float32[Tensor, "L H T"]
    """|v_j|: a weight on a short value moves little (Kobayashi et al. 2020, equation 4)."""
    loss: Float32[Tensor, " T-1"]
    """Nats: -log p of each token after the first, given those before it."""
    logits: Float32[Tensor, "T V"] | None = None


@contextmanager
def _explicit_face(model: GPT) -> Iterator[None]:
    """Attention written out and dropout off while the body runs; every flag as it was afterwards."""
    attention = [cast(Block, block).attention for block in model.blocks]
    fused = [module.fused for module in attention]
    training = [(module, module.training) for module in model.modules()]
    try:
        for module in attention:
            module.fused = False
        model.eval()
        yield
    finally:
        for module, was in zip(attention, fused, strict=True):
            module.fused = was
        for part, mode in training:
            part.training = mode  # one by one: model.train() would wake what was put to rest on purpose


@contextmanager
def _hooks(model: GPT, on_weights: Watcher, on_values: Watcher | None) -> Iterator[None]:
    """Forward hooks in each layer while the body runs."""

    def weights_hook(layer: int) -> Callable[..., None]:
        return lambda module, args, weights: on_weights(layer, weights)

    def values_hook(layer: int, heads: int, shared: int, watcher: Watcher) -> Callable[..., None]:
        def hook(module: object, args: object, qkv: Tensor) -> None:
            values = qkv.unflatten(-1, (heads + 2 * shared, -1))[..., heads + shared :, :].transpose(1, 2)
            watcher(layer, ops.share_heads(values, heads))

        return hook

    handles: list[Any] = []
    try:
        for layer, block in enumerate(model.blocks):
            attention = cast(Block, block).attention
            handles.append(attention.weights.register_forward_hook(weights_hook(layer)))
            if on_values is not None:
                hook = values_hook(layer, attention.n_heads, attention.n_kv_heads, on_values)
                handles.append(attention.qkv.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: GPT, tokens: Int[Tensor, "B T"], on_weights: Watcher, on_values: Watcher | None = None
) -> Float32[Tensor, "B T V"]:
    """Read texts on the explicit face, in fp32 and without autograd, showing what each layer computes.

    The watchers get tensors on the model's device and should keep only what they need: all layers together
    are large.

    Args:
        tokens: B texts of one length; shorter ones padded on the right, which no earlier position can see.
        on_weights: gets (layer, attention weights (B, H, T, T)).
        on_values: gets (layer, values (B, H, T, D)), those of shared heads repeated.

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
        _explicit_face(model),
        _hooks(model, on_weights, on_values),
    ):
        if all(p.dtype == torch.float32 for p in model.parameters()):
            return cast(Tensor, model(tokens.to(device)))
        in_fp32 = {name: p.float() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, in_fp32, (tokens.to(device),))


def pad(texts: Sequence[Sequence[int]]) -> Int64[Tensor, "B T"]:
    """Texts side by side, the shorter ones filled up on the right with token 0."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.long)


def capture_batch(model: GPT, texts: Sequence[Sequence[int]], logits: bool = False) -> list[Capture]:
    """`capture` for several texts of any lengths in one pass.

    Raises:
        ValueError: if there is no text, or one is empty or longer than the context.
    """
    if not texts or not all(texts):
        raise ValueError("no tokens; the model reads at least 1")
    tokens, config = pad(texts), model.config
    lengths = [len(text) for text in texts]
    patterns = [torch.empty(config.n_layers, config.n_heads, T, T) for T in lengths]
    norms = [torch.empty(config.n_layers, config.n_heads, T) for T in lengths]

    def keep_weights(layer: int, weights: Float[Tensor, "B H T T"]) -> None:
        for k, T in enumerate(lengths):
            patterns[k][layer] = weights[k, :, :T, :T]

    def keep_norms(layer: int, values: Float[Tensor, "B H T D"]) -> None:
        for k, T in enumerate(lengths):
            norms[k][layer] = values[k, :, :T].norm(dim=-1)

    scores = observe(model, tokens, keep_weights, keep_norms).cpu()
    captures = []
    for k, T in enumerate(lengths):
        loss = F.cross_entropy(scores[k, : T - 1], tokens[k, 1:T], reduction="none")
        kept = scores[k, :T].clone() if logits else None
        captures.append(Capture(tokens[k, :T].clone(), patterns[k], norms[k], loss, kept))
    return captures


def capture(model: GPT, tokens: Int[Tensor, " T"], logits: bool = False) -> Capture:
    """Attention weights of every layer and head while `model` reads `tokens`.

    Args:
        tokens: 1 to `context` token ids, on any device.
        logits: keep the logits (T, V) too.

    Raises:
        ValueError: if the text is empty, longer than the context, or holds a token unknown to the model.
    """
    return capture_batch(model, [tokens.tolist()], logits)[0]
