"""Activation patching: which activations of a clean text bring the right answer back on a corrupt one.

The model runs on the corrupt text with some activations replaced by those of the clean text (Meng et al. 2022, section 2,
"causal tracing"; Wang et al. 2022, section 3.3; Heimersheim & Nanda 2024, "denoising"). The logit difference, of the
right minus the wrong answer, is 1 if all of it comes back and 0 if none does: (patched - corrupt) / (clean - corrupt).
Shapes: B texts, L layers, H heads, T positions, C model width, D head size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import CONFIG, UserError
from inspection.activation_cache import LayerActivations, blocks_of, inference_mode, run_layers
from model.gpt import GPT

CONTROLS = 8  # texts over which the control is averaged
ROWS = 32  # texts in one forward pass
MIN_DIFFERENCE = 1e-3  # of logit differences: less is rounding
Answers = tuple[int, int]  # tokens: right, wrong


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """The share of the logit difference that each patch brings back, and that of its control.

    The control is the same patch with the activations of `control_texts`. A patch says something where it exceeds it.
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


def control_texts(clean: Sequence[int], corrupt: Sequence[int]) -> list[list[int]]:
    """The clean text with other tokens of it, at random, wherever it differs from the corrupt one: `CONTROLS` times, always
    the same. They change what the clean text changes, but to nothing that speaks for its answer."""
    rng, pairs = random.Random("patching controls"), list(zip(clean, corrupt, strict=True))
    changed = {token for pair in pairs if pair[0] != pair[1] for token in pair}
    others = sorted({*clean[1:]} - changed) or clean
    return [[a if a == b else rng.choice(others) for a, b in pairs] for _ in range(CONTROLS)]


def patch_texts(
    model: GPT, encode: Callable[[str], list[int]], clean: str, corrupt: str, right: str, wrong: str
) -> PatchingResult:
    """`activation_patching` of two texts that `encode` turns into tokens.

    The answers are distinguished by the first token in which they differ; what they share before it is added to the texts.

    Raises UserError (exit code 2) if the texts differ in their number of tokens or are too long, the tokenizer merges
    an answer with the text before it, or the answers do not differ; and as `activation_patching`.
    """
    prompts = encode(clean), encode(corrupt)
    n, m = map(len, prompts)
    if n != m:
        raise UserError(f"the clean text has {n} tokens, the corrupt one {m}; patching needs as many in both", CONFIG)
    answers = [encode(clean + answer)[n:] for answer in (right, wrong)]
    for answer, tokens in zip((right, wrong), answers, strict=True):
        if [encode(clean + answer), encode(corrupt + answer)] != [prompt + tokens for prompt in prompts]:
            raise UserError(f"the tokenizer merges {answer!r} with the text before it; move a space or a word", CONFIG)
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
    with inference_mode(model):
        clean_layers, layers = (list(run_layers(model, torch.tensor([text]))) for text in (clean, corrupt))
        before, after = (float(_logit_diffs(model, each[-1].resid_post, answers)) for each in (clean_layers, layers))
        if not abs(before - after) >= MIN_DIFFERENCE:
            what = f"the logit difference is {before:.3f} on both texts, so there is nothing to bring back"
            raise UserError(f"{what}; take texts with different answers", CONFIG)

        sources = [clean, *control_texts(clean, corrupt)]
        bar = tqdm(sources, desc="patching", unit="text", delay=3, leave=False, disable=None)
        patched_all = zip(*(_patch_all(model, source, layers, answers) for source in bar), strict=True)
        shares = [(np.array(tables) - after) / (before - after) for tables in patched_all]
    tables = [table for share in shares for table in (share[0], share[1:].mean(axis=0))]
    return PatchingResult(list(clean), list(corrupt), answers, before, after, *tables)


def _patch_all(
    model: GPT, source: Sequence[int], layers: Sequence[LayerActivations], answers: Answers
) -> tuple[list[list[float]], list[list[float]]]:
    """The logit differences with activations of `source` at each position before each layer, (L, T), and in each head."""
    T, H, D = len(source), model.config.n_heads, model.config.d_head
    positions, heads = torch.eye(T, dtype=torch.bool)[:, :, None], torch.eye(H, dtype=torch.bool)
    head_columns = heads.repeat_interleave(D, dim=1)[:, None]
    residual, by_head = [], []
    for number, new in enumerate(run_layers(model, torch.tensor([source]))):
        block = blocks_of(model)[number]
        residual.append(patched(model, block, new.resid_pre, positions, layers[number:], answers).tolist())
        by_head.append(patched(model, block.attention.out, new.z, head_columns, layers[number:], answers).tolist())
    return residual, by_head


def patched(
    model: GPT,
    module: nn.Module,
    source: Float[Tensor, "1 T N"],
    masks: Bool[Tensor, "B _ _"],
    layers: Sequence[LayerActivations],
    answers: Answers,
) -> Float[Tensor, " B"]:
    """The logit difference where the module's input is replaced by `source` where each of B masks is true.

    `layers` are the corrupt text's activations from the module's layer on; the layers below are not run again.
    """
    results = []
    for mask in masks.to(source.device).split(ROWS):

        def replace(module: object, args: tuple[Any, ...], mask: Tensor = mask) -> tuple[Any, ...]:
            return torch.where(mask, source, args[0]), *args[1:]

        with module.register_forward_pre_hook(replace):  # after those of an ablation
            x = layers[0].resid_pre.expand(len(mask), -1, -1)
            for block in blocks_of(model)[-len(layers) :]:
                x = block(x, layers[0].rope)
        results.append(_logit_diffs(model, x, answers))
    return torch.cat(results)


def _logit_diffs(model: GPT, residual: Float[Tensor, "B T C"], answers: Answers) -> Float[Tensor, " B"]:
    """The logit of the right minus that of the wrong answer after each text."""
    logits: Tensor = model.lm_head(model.final_norm(residual[:, -1:]))[:, 0]
    return (logits[:, answers[0]] - logits[:, answers[1]]).cpu()
