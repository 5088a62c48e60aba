"""Which part of the model wrote a logit: the residual stream, layer by layer, and an exact sum of its parts.

Every layer adds to the residual stream, and the head reads the sum. So a logit is a sum too: of what each embedding,
head and MLP wrote, seen from the token's column of the head (Elhage et al. 2021, "Direct path terms"). It tells what
was written *directly*: what a head did by being read further up counts as the reader's. `causal.py` measures what
all of it together amounts to.

Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model import functional
from model.gpt import GPT, Block, LayerNorm, Rope


@dataclass(frozen=True)
class Layer:
    """What one layer read, and what it made of it."""

    before: Float[Tensor, "B T C"]
    """The residual stream that enters."""
    heads: Float[Tensor, "B T HD"]
    """The heads' outputs side by side, before `attention.out` mixes them."""
    mlp: Float[Tensor, "B T C"]
    after: Float[Tensor, "B T C"]


@dataclass(frozen=True)
class Attribution:
    """One logit as a sum."""

    position: int
    token: int
    labels: tuple[str, ...]
    """Such as `token embedding`, `L0H1`, `L0 attention bias`, `L0 MLP`, `final shift`."""
    parts: Float[Tensor, " N"]
    """What each of them adds to the logit; on the CPU."""

    @property
    def total(self) -> float:
        """The logit, within rounding."""
        return float(self.parts.sum())

    def part(self, label: str) -> float:
        return float(self.parts[self.labels.index(label)])


@contextmanager
def at_rest(model: GPT) -> Iterator[GPT]:
    """The model without dropout, autograd and autocast while the body runs; every flag as it was afterwards.

    Weights in half precision are read in fp32, from a copy.
    """
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(model.token_embedding.weight.device.type, enabled=False):
            yield model
    finally:
        for module, mode in training:
            module.training = mode  # one by one: model.train() would wake what was put to rest on purpose


def embedded(model: GPT, tokens: Int[Tensor, "B T"]) -> tuple[dict[str, Float[Tensor, "_ T C"]], Rope | None]:
    """What stands in the residual stream at first, by name, and the angles of rotary positions: the head of
    `GPT.forward`, its sum not yet drawn.

    Raises:
        ValueError: if the texts are empty, longer than the context, or hold a token unknown to the model.
    """
    T, config = tokens.shape[1], model.config
    if not 1 <= T <= config.context:
        raise ValueError(f"{T} tokens; the model reads 1 to {config.context}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
        raise ValueError(f"a token lies outside the model's vocabulary of {model.vocab_size}")
    tokens = tokens.to(model.token_embedding.weight.device)
    positions = torch.arange(T, device=tokens.device)
    parts = {"token embedding": model.token_embedding(tokens)}
    if model.position_embedding is None:
        return parts, functional.precompute_rope(positions, config.d_head, config.architecture.rope_theta)
    return {**parts, "position embedding": model.position_embedding(positions)[None]}, None


def blocks_of(model: GPT) -> list[Block]:
    return [cast(Block, block) for block in model.blocks]


def layers(model: GPT, x: Float[Tensor, "B T C"], angles: Rope | None) -> Iterator[Layer]:
    """Each layer in turn, while the model reads on from the embeddings `x`."""
    for block in blocks_of(model):
        layer = _run(block, x, angles)
        yield layer
        x = layer.after


def _run(block: Block, x: Float[Tensor, "B T C"], angles: Rope | None) -> Layer:
    seen: dict[str, Tensor] = {}
    handles = [
        block.attention.out.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0])),
        block.mlp.register_forward_hook(lambda module, args, out: seen.update(mlp=out)),
    ]
    try:
        after = block(x, angles)
    finally:
        for handle in handles:
            handle.remove()
    return Layer(x, seen["heads"], seen["mlp"], after)


def _reading(model: GPT, x: Float[Tensor, " C"], token: int) -> tuple[Float[Tensor, " C"], Float[Tensor, ""] | None]:
    """The vector whose product with a part of `x` is that part's share of the logit, and the norm's own share.

    The final norm is linear once it is known by what it divides: taking the mean from `x` is the same as taking it
    from the vector that reads `x`.
    """
    norm, column = model.final_norm, model.lm_head.weight[token]
    reader = column * norm.weight
    if not isinstance(norm, LayerNorm):
        return reader * torch.rsqrt(x.square().mean() + norm.eps), None
    scale = torch.rsqrt((x - x.mean()).square().mean() + norm.eps)
    return (reader - reader.mean()) * scale, None if norm.bias is None else norm.bias @ column


def direct_logit_attribution(
    model: GPT, tokens: Int[Tensor, " T"], position: int = -1, token: int | None = None
) -> Attribution:
    """The logit of `token` after `tokens[: position + 1]`, as a sum over everything that wrote into the stream.

    The parts add up to the model's own logit: within 1e-4 in fp32, and, as the tests check on a model in double
    precision, within 1e-9. Biases: a value's is part of its head, the MLP's are part of the MLP, that of the
    attention's output and that of the last norm stand alone.

    Args:
        tokens: one text; what comes after `position` plays no part.
        position: counts from the end where it is negative.
        token: `None` takes the likeliest.

    Raises:
        ValueError: if the text is empty or too long, or position or token are out of range.
    """
    if not -len(tokens) <= position < len(tokens) or not 0 <= (token or 0) < model.vocab_size:
        raise ValueError(f"position {position} or token {token} out of range")
    with at_rest(model) as model:
        embeddings, angles = embedded(model, tokens[None])
        # One position counts; all of them, of all layers, would be large.
        here = [
            (layer.heads[0, position], layer.mlp[0, position], layer.after[0, position])
            for layer in layers(model, sum_of(embeddings), angles)
        ]
        final = here[-1][2]
        chosen = int(model.lm_head(model.final_norm(final)).argmax()) if token is None else token
        reader, shift = _reading(model, final, chosen)
        parts = {name: x[0, position] @ reader for name, x in embeddings.items()}
        for number, (block, (heads, mlp, _)) in enumerate(zip(blocks_of(model), here, strict=True)):
            attention = block.attention
            by_head = (heads * (reader @ attention.out.weight)).unflatten(-1, (attention.n_heads, -1)).sum(dim=-1)
            parts |= {f"L{number}H{head}": share for head, share in enumerate(by_head)}
            if attention.out.bias is not None:
                parts[f"L{number} attention bias"] = attention.out.bias @ reader
            parts[f"L{number} MLP"] = mlp @ reader
        if shift is not None:
            parts["final shift"] = shift
    return Attribution(position % len(tokens), chosen, tuple(parts), torch.stack(list(parts.values())).cpu())


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    """The stream that the embeddings make together."""
    first, *rest = parts.values()
    for part in rest:
        first = first + part
    return first


def logit_lens(model: GPT, tokens: Int[Tensor, " T"]) -> Float[Tensor, "Lplus1 T V"]:
    """What the model would say if it stopped early: logits from the stream as the embeddings left it (row 0) and as
    each layer left it, through the last norm and the head (nostalgebraist 2020, "interpreting GPT: the logit lens").

    The last row holds the model's own logits, to the bit.

    Raises:
        ValueError: if the text is empty, longer than the context, or holds a token unknown to the model.
    """
    with at_rest(model) as model:
        embeddings, angles = embedded(model, tokens[None])
        x = sum_of(embeddings)
        stages = [x, *(layer.after for layer in layers(model, x, angles))]
        return torch.cat([model.lm_head(model.final_norm(stage)) for stage in stages]).cpu()
