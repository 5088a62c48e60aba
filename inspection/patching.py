"""Activation patching: which activations of a clean text bring the right answer back on a corrupt one.

The model runs on the corrupt text with some activations replaced by those of the clean text (Meng et al. 2022, section 2,
"causal tracing"; Wang et al. 2022, section 3.3; Heimersheim & Nanda 2024, "denoising"). The logit difference, of the
right minus the wrong answer, is 1 if all of it comes back and 0 if none does: (patched - corrupt) / (clean - corrupt).
Shapes: B texts, L layers, H heads, T positions, C model width, D head size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import CONFIG, UserError
from inspection.activation_cache import blocks_of, check_tokens, inference_mode
from inspection.attribution import run_layers
from model.gpt import GPT

CONTROLS = 8  # shuffles of the clean text, over which the control is averaged
ROWS = 32  # texts in one forward pass
MIN_DIFFERENCE = 1e-3  # of logit differences: less is rounding
Answers = tuple[int, int]  # tokens: right, wrong


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """The share of the logit difference that each patch brings back, and that of its control.

    The control is the same patch with the activations of an unrelated text: the clean text's tokens after the first, in
    a random order (the mean over `CONTROLS` orders, the same every time). A patch says something where it exceeds it.
    """

    clean_tokens: list[int]
    corrupt_tokens: list[int]
    answers: Answers
    clean: float  # logit difference of the right minus the wrong answer, in nats
    corrupt: float
    residual: NDArray[np.float64]  # (L, T): the residual stream before a layer, at one position
    residual_control: NDArray[np.float64]
    heads: NDArray[np.float64]  # (L, H): a head's output, at all positions
    heads_control: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: arrays become lists."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}


def patch_texts(
    model: GPT, encode: Callable[[str], list[int]], clean: str, corrupt: str, right: str, wrong: str
) -> PatchingResult:
    """`activation_patching` of two texts that `encode` turns into tokens.

    The answers are told apart by the first token in which they differ; what they share before it is added to the texts.

    Raises UserError (exit code 2) if the texts differ in their number of tokens or are too long, the tokenizer merges
    an answer with the text before it, or the answers do not differ; and as `activation_patching`.
    """
    prompts = encode(clean), encode(corrupt)
    n, m = map(len, prompts)
    if n != m:
        raise UserError(f"the clean text has {n} tokens, the corrupt one {m}; patching needs as many in both", CONFIG)
    answers = [encode(clean + answer)[n:] for answer in (right, wrong)]
    for answer, tokens in zip((right, wrong), answers, strict=True):
        for text, prompt in zip((clean, corrupt), prompts, strict=True):
            if encode(text + answer) != prompt + tokens:
                raise UserError(
                    f"the tokenizer merges {answer!r} with the text before it; move a space or a word", CONFIG
                )
    pairs = enumerate(zip(*answers, strict=False))
    if (first := next((k for k, (one, other) in pairs if one != other), None)) is None:
        raise UserError(f"{right!r} and {wrong!r} do not differ in a token; neither may begin with the other", CONFIG)
    n, context, shared = n + first, model.config.context, answers[0][:first]
    if n > context:
        raise UserError(f"the texts have {n} tokens; the model takes {context}: give shorter ones", CONFIG)
    chosen = answers[0][first], answers[1][first]
    return activation_patching(model, prompts[0] + shared, prompts[1] + shared, chosen)


def activation_patching(model: GPT, clean: Sequence[int], corrupt: Sequence[int], answers: Answers) -> PatchingResult:
    """Patch the residual stream at each (layer, position), and each head's output at all positions.

    Raises UserError (exit code 2) if the model has the same logit difference on both texts; ValueError like
    `check_tokens`.
    """
    with inference_mode(model) as model:
        before, after = (float(_logit_diffs(model, torch.tensor([text]), answers)) for text in (clean, corrupt))
        if not abs(before - after) >= MIN_DIFFERENCE:
            what = f"the logit difference is {before:.3f} on both texts, so there is nothing to bring back"
            raise UserError(f"{what}; take texts with different answers", CONFIG)

        def shares(source: Sequence[int]) -> list[NDArray[np.float64]]:
            return [
                (np.array(t, np.float64) - after) / (before - after)
                for t in _patch_all(model, source, corrupt, answers)
            ]

        residual, heads = shares(clean)
        rng, controls = random.Random("patching controls"), []
        for _ in range(CONTROLS):
            controls.append(shares([clean[0], *rng.sample(clean[1:], len(clean) - 1)]))
        residual_control, heads_control = (np.mean(tables, axis=0) for tables in zip(*controls, strict=True))
    texts = list(clean), list(corrupt)
    return PatchingResult(*texts, answers, before, after, residual, residual_control, heads, heads_control)


def _patch_all(
    model: GPT, source: Sequence[int], corrupt: Sequence[int], answers: Answers
) -> tuple[list[list[float]], list[list[float]]]:
    """The logit differences with activations of `source` at each position before each layer, (L, T), and in each head."""
    T, H, D = len(source), model.config.n_heads, model.config.d_head
    positions, heads = torch.eye(T, dtype=torch.bool)[:, :, None], torch.eye(H, dtype=torch.bool)
    head_columns = heads.repeat_interleave(D, dim=1)[:, None]
    residual, by_head = [], []
    for block, layer in zip(blocks_of(model), run_layers(model, torch.tensor([source])), strict=True):
        residual.append(patched(model, block, layer.resid_pre, positions, corrupt, answers).tolist())
        by_head.append(patched(model, block.attention.out, layer.z, head_columns, corrupt, answers).tolist())
    return residual, by_head


def patched(
    model: GPT,
    module: nn.Module,
    source: Float[Tensor, "1 T N"],
    masks: Bool[Tensor, "B _ _"],
    corrupt: Sequence[int],
    answers: Answers,
) -> Float[Tensor, " B"]:
    """The logit difference on `corrupt` with the module's input replaced by `source` where each of B masks is true."""
    results = []
    for mask in masks.to(source.device).split(ROWS):

        def replace(module: object, args: tuple[Any, ...], mask: Tensor = mask) -> tuple[Any, ...]:
            return torch.where(mask, source, args[0]), *args[1:]

        with module.register_forward_pre_hook(replace):  # after those of an ablation
            results.append(_logit_diffs(model, torch.tensor([corrupt]).expand(len(mask), -1), answers))
    return torch.cat(results)


def _logit_diffs(model: GPT, tokens: Tensor, answers: Answers) -> Float[Tensor, " B"]:
    """The logit of the right minus that of the wrong answer after each text (B, T)."""
    check_tokens(model, tokens)
    last = model.hidden_states(tokens.to(model.token_embedding.weight.device))[:, -1]
    logits: Tensor = model.lm_head(last)
    return (logits[:, answers[0]] - logits[:, answers[1]]).cpu()
