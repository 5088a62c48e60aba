"""Which parts of the model wrote a logit: direct logit attribution, and the logit lens.

A logit is a sum of what each embedding, head and MLP wrote to the residual stream, projected on the token's unembedding
(Elhage et al. 2021, "Direct path terms"). The effect of a head through later layers counts as theirs.
Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from inspection.activation_cache import blocks_of, embeddings, inference_mode, run_layers
from model.gpt import GPT, LayerNorm


def _direction(model: GPT, x: Float[Tensor, " C"], token: int) -> tuple[Float[Tensor, " C"], Float[Tensor, ""] | None]:
    """The direction on which a part of `x` is projected to get its share of the logit, and the norm bias's share.

    The final norm is linear once its divisor is known; subtracting the mean from the direction does so for `x`.
    """
    norm, unembedding = model.final_norm, model.lm_head.weight[token]
    if isinstance(norm, nn.Identity):
        return unembedding, None
    direction = unembedding * norm.weight
    if not isinstance(norm, LayerNorm):
        return direction * torch.rsqrt(x.square().mean() + norm.eps), None
    scale = torch.rsqrt((x - x.mean()).square().mean() + norm.eps)
    return (direction - direction.mean()) * scale, None if norm.bias is None else norm.bias @ unembedding


def direct_logit_attribution(
    model: GPT, tokens: Int[Tensor, " T"], token: int | None = None
) -> tuple[int, dict[str, float]]:
    """The logit of `token` after the text, as a sum over everything that wrote to the residual stream.

    The bias of the values is part of each head, those of the MLP part of the MLP; the biases of the attention output and
    of the final norm are parts of their own.

    Returns the token, by default the most likely one, and what each part adds: `token embedding`, `L0H1`,
    `L0 attention bias`, `L0 MLP`, `final norm bias`, ... They add up to the model's logit within 1e-4 in fp32 and 1e-9
    in double precision. Raises ValueError like `check_tokens`.
    """
    with inference_mode(model):
        # Only the last position is kept: all positions of all layers would be large.
        layers = [
            (layer.z[0, -1], layer.mlp_out[0, -1], layer.resid_post[0, -1]) for layer in run_layers(model, tokens[None])
        ]
        final = layers[-1][2]
        chosen = int(model.lm_head(model.final_norm(final)).argmax()) if token is None else token
        direction, norm_bias = _direction(model, final, chosen)
        embedded = embeddings(model, tokens[None].to(final.device))
        parts = {name: x[0, -1] @ direction for name, x in embedded.items()}
        for number, (block, (z, mlp_out, _)) in enumerate(zip(blocks_of(model), layers, strict=True)):
            out = block.attention.out
            by_head = (z * (direction @ out.weight)).unflatten(-1, (block.attention.n_heads, -1)).sum(dim=-1)
            parts |= {f"L{number}H{head}": share for head, share in enumerate(by_head)}
            if out.bias is not None:
                parts[f"L{number} attention bias"] = out.bias @ direction
            if block.mlp is not None:
                parts[f"L{number} MLP"] = mlp_out @ direction
        if norm_bias is not None:
            parts["final norm bias"] = norm_bias
    return chosen, {name: float(part) for name, part in parts.items()}


def logit_lens(model: GPT, tokens: Int[Tensor, " T"]) -> Float[Tensor, "Lplus1 T V"]:
    """Logits from the residual stream after the embeddings (row 0) and after each layer, through final norm and LM head.

    From nostalgebraist 2020, "interpreting GPT: the logit lens". The last row is the model's logits, bit for bit.
    Raises ValueError like `check_tokens`.
    """
    with inference_mode(model):
        layers = [(layer.resid_pre, layer.resid_post) for layer in run_layers(model, tokens[None])]
        stages = [layers[0][0], *(resid_post for _, resid_post in layers)]
        return torch.cat([model.lm_head(model.final_norm(stage)) for stage in stages]).cpu()
