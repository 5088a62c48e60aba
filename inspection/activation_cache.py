"""What the model computes: `run_layers` yields the activations of each layer, `run_with_cache` keeps those of attention.

Both leave the model unchanged. Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head size.
A[l, h, i, j] is how much query i attends to key j; it is 0 for j > i, and each row sums to 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn

from inspection.attention_file import DETAILS, TOP_K
from model import functional
from model.gpt import GPT, Block, Rope


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computes, on the model's device."""

    resid_pre: Float[Tensor, "B T C"]  # the residual stream before the layer
    queries: Float[Tensor, "B H T D"]  # after QK norm and rotary embedding, as the keys
    keys: Float[Tensor, "B H T D"]  # shared heads are repeated, also of the values
    values: Float[Tensor, "B H T D"]
    pattern: Float[Tensor, "B H T T"]
    z: Float[Tensor, "B T HD"]  # the heads' outputs, concatenated, before `attention.out` projects them
    attn_out: Float[Tensor, "B T C"]  # what the layer's attention adds to the residual stream
    mlp_out: Float[Tensor, "B T C"]
    resid_post: Float[Tensor, "B T C"]
    rope: Rope | None  # the rotary angles, the same in every layer


@dataclass(frozen=True)
class ActivationCache:
    """Activations of one text. All tensors are on the CPU and share no memory with the model."""

    tokens: Int64[Tensor, " T"]
    pattern: Float32[Tensor, "L H T T"]
    value_norms: Float32[Tensor, "L H T"]  # |v_j W_O|: how much a head can add to the residual stream by attending to j
    loss: Float32[Tensor, " T-1"]  # -log p of each token after the first, in nats
    top_ids: Int64[Tensor, "T N"]  # the `TOP_K` most likely next tokens, most likely first
    top_probs: Float32[Tensor, "T N"]
    queries: Float32[Tensor, "L H T D"] | None = None  # this and the next three as in `LayerActivations`
    keys: Float32[Tensor, "L H T D"] | None = None
    values: Float32[Tensor, "L H T D"] | None = None
    attn_out: Float32[Tensor, "L T C"] | None = None


def blocks_of(model: GPT) -> list[Block]:
    return [cast(Block, block) for block in model.blocks]


@contextmanager
def inference_mode(model: GPT) -> Iterator[None]:
    """Run the model with eager attention, without dropout, autograd and autocast; afterwards it is as before."""
    implementations = [(block.attention, block.attention.attention_implementation) for block in blocks_of(model)]
    was_training = model.training
    try:
        for attention, _ in implementations:
            attention.attention_implementation = "eager"
        model.eval()
        with torch.no_grad(), torch.autocast(model.token_embedding.weight.device.type, enabled=False):
            yield
    finally:
        for attention, implementation in implementations:
            attention.attention_implementation = implementation
        model.train(was_training)


def check_tokens(model: GPT, tokens: Int[Tensor, "B T"]) -> None:
    """Raise ValueError if the texts are empty, longer than the context, or have an unknown token."""
    T, context = tokens.shape[1], model.config.context
    if not 1 <= T <= context:
        raise ValueError(f"{T} tokens; the model takes 1 to {context}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
        raise ValueError(f"a token is outside the model's vocabulary of {model.vocab_size}")


def run_layers(model: GPT, tokens: Int[Tensor, "B T"]) -> Iterator[LayerActivations]:
    """Run the blocks one by one, in `inference_mode`; yields each layer's activations. Shorter texts are padded on the right,
    which no earlier position attends to. Raises ValueError like `check_tokens`.

    Keep only what is needed: the activations of all layers together are large.
    """
    check_tokens(model, tokens)
    tokens = tokens.to(model.token_embedding.weight.device)
    rope = model.rope(torch.arange(tokens.shape[1], device=tokens.device))
    x = reduce(torch.add, embeddings(model, tokens).values())
    for block in blocks_of(model):
        attention, seen = block.attention, dict[nn.Module, tuple[Tensor, ...]]()

        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, seen: Any = seen) -> None:
            seen[module] = (*args, out)

        with ExitStack() as handles:
            for module in (attention.qkv, attention.pattern, attention.out):
                handles.enter_context(module.register_forward_hook(see))
            attn_out = attention(block.norm1(x), rope)
        (_, qkv), (queries, keys, pattern), (z, _) = seen.values()
        H, G = attention.n_heads, attention.n_kv_heads
        values = functional.repeat_kv(qkv.unflatten(-1, (H + 2 * G, -1))[..., H + G :, :].transpose(1, 2), H)
        resid_mid = x + attn_out
        mlp_out = block.mlp_out(resid_mid)
        resid_post = resid_mid + mlp_out
        yield LayerActivations(x, queries, keys, values, pattern, z, attn_out, mlp_out, resid_post, rope)
        x = resid_post


def embeddings(model: GPT, tokens: Int[Tensor, "B T"]) -> dict[str, Float[Tensor, "_ T C"]]:
    """The embeddings by name; their sum is the residual stream before layer 0."""
    parts = {"token embedding": model.token_embedding(tokens)}
    if model.position_embedding is not None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        parts["position embedding"] = model.position_embedding(positions)[None]
    if model.ngram_embedding is not None:
        parts["n-gram embedding"] = model.ngram_embedding(tokens)
    return parts


def pad(texts: Sequence[Sequence[int]]) -> Int64[Tensor, "B T"]:
    """Texts as a batch, padded on the right with token 0."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.long)


def value_norms(values: Float[Tensor, "B H T D"], out: Float[Tensor, "C HD"]) -> Float[Tensor, "B H T"]:
    """|v_j W_O| of each head (Kobayashi et al. 2020, section 3); `out` has D columns for each."""
    # Head by head: all of them at once would be (B, H, T, C).
    projections = out.split(values.shape[-1], dim=1)
    return torch.stack([(values[:, h] @ W_O.T).norm(dim=-1) for h, W_O in enumerate(projections)], dim=1)


def run_with_cache_batch(model: GPT, texts: Sequence[Sequence[int]], details: bool = False) -> list[ActivationCache]:
    """Run the model on texts of any lengths; cache attention patterns, value norms, losses and likely next tokens.

    With `details` queries, keys, values and attention outputs too. Raises ValueError like `check_tokens`.
    """
    tokens, lengths = pad(texts), list(map(len, texts))
    names = ("pattern", "value_norms", *(DETAILS if details else ()))
    kept: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for _ in texts]
    with inference_mode(model):
        for block, layer in zip(blocks_of(model), run_layers(model, tokens), strict=True):
            norms = value_norms(layer.values, block.attention.out.weight)
            for name in names:
                batch = norms if name == "value_norms" else getattr(layer, name)
                for text, T, part in zip(kept, lengths, batch, strict=True):
                    part = part[:T] if name == "attn_out" else part[:, :T, :T] if name == "pattern" else part[:, :T]
                    text[name].append(part.float().cpu())
        all_logits = model.lm_head(model.final_norm(layer.resid_post)).float().cpu()
    caches = []
    for k, (T, layers) in enumerate(zip(lengths, kept, strict=True)):
        activations = {name: torch.stack(layers.pop(name)) for name in names}
        loss = F.cross_entropy(all_logits[k, : T - 1], tokens[k, 1:T], reduction="none")
        probs = all_logits[k, :T].softmax(dim=-1)
        activations["top_probs"], activations["top_ids"] = probs.topk(min(TOP_K, probs.shape[-1]))
        caches.append(ActivationCache(tokens[k, :T].clone(), loss=loss, **activations))
    return caches


def run_with_cache(model: GPT, tokens: Int[Tensor, " T"], details: bool = False) -> ActivationCache:
    """`run_with_cache_batch` for one text."""
    return run_with_cache_batch(model, [tokens.tolist()], details)[0]
