"""Runs a model on the evaluation texts: head scores, and the answers to contrast pairs.

Shapes: B texts, L layers, H heads, T positions, P contrast pairs.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from inspection.activation_cache import inference_mode, pad, run_layers
from inspection.contrast_pairs import ContrastPair
from inspection.eval_items import GatherIndex, pair_task
from inspection.eval_texts import EvalTexts
from inspection.head_scores import ANTECEDENT, HELD_OUT, PARAMETERS, REPEATS, SCORES
from model.gpt import GPT

SCORED_PAIRS = 16  # the first contrast pairs of each kind are measured
PAIR_ROWS = 16  # texts in one forward pass of `score_pairs`
MIN_QUERIES = 100  # a mean over fewer queries is often different on other text, by 0.1 and more
TokenBytes = Callable[[int], bytes]  # The bytes of a token id.


def compute_head_scores(model: GPT, eval_texts: EvalTexts, token_bytes: TokenBytes) -> dict[str, Float[Tensor, "L H"]]:
    """Every score of every head, f32 on the CPU: means over the queries of all texts. A score without queries, or that is not
    finite, is left out."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.n_layers)]
    for measured_on, texts in ((REPEATS, eval_texts.repeats), (HELD_OUT, eval_texts.scored_texts())):
        if not texts:
            continue
        with inference_mode(model):
            for means, layer in zip(layers, run_layers(model, pad(texts)), strict=True):
                values = _query_values(layer.pattern, texts, token_bytes, measured_on)
                means |= {name: value.mean(dim=-1) for name, value in values.items()}
    scores = {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}
    scores |= {s.name: s.compute(model) for s in SCORES.values() if s.texts == PARAMETERS and s.compute}
    pairs = [p for kind in eval_texts.pairs_by_kind().values() for p in kind[:SCORED_PAIRS] if p.antecedent]
    _, attention = score_pairs(model, pairs)
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        scores[ANTECEDENT + kind] = attention[[k for k, pair in enumerate(pairs) if pair.kind == kind]].mean(dim=0)
    return {name: table for name, table in scores.items() if table.isfinite().all()}


def compute_head_score(
    model: GPT, texts: Sequence[Sequence[int]], score: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "L H"]:
    """One score of every head, like those of `head_scores.py`: the mean over the queries of all texts."""
    layers: list[Tensor] = []
    with inference_mode(model):
        for layer in run_layers(model, pad(texts)):
            pairs = zip(layer.pattern.cpu(), texts, strict=True)
            values = [score(pattern[:, : len(text), : len(text)], torch.tensor(text)) for pattern, text in pairs]
            layers.append(torch.cat(values, dim=-1).mean(dim=-1))
    return torch.stack(layers)


def uniform_scores(eval_texts: EvalTexts, token_bytes: TokenBytes) -> dict[str, float]:
    """What uniform attention, A[i, j] = 1 / (i + 1), scores on the same queries, of scores with enough of them."""
    scores: dict[str, Tensor] = {}
    for measured_on, texts in ((REPEATS, eval_texts.repeats), (HELD_OUT, eval_texts.scored_texts())):
        ones = (torch.ones(1, len(text), len(text)).tril() for text in texts)
        scores |= _query_values((one / one.sum(-1, keepdim=True) for one in ones), texts, token_bytes, measured_on)
    return {name: values.mean().item() for name, values in scores.items() if values.numel() >= MIN_QUERIES}


def _query_values(
    patterns: Iterable[Tensor], texts: Sequence[Sequence[int]], token_bytes: TokenBytes, measured_on: str
) -> dict[str, Float[Tensor, "H Q"]]:
    """Each score's values of the queries of all texts, from their patterns (H, T, T), which can be padded."""
    scores: dict[str, list[Tensor]] = {}
    for pattern, text in zip(patterns, texts, strict=True):
        pattern, tokens = pattern[:, : len(text), : len(text)], torch.tensor(text, device=pattern.device)
        pieces = tuple(map(token_bytes, text))
        for score in SCORES.values():
            if score.texts == measured_on and score.compute:
                value = score.compute(pattern, pieces if score.uses_bytes else tokens)
                scores.setdefault(score.name, []).append(value)
    return {name: torch.cat(values, dim=-1) for name, values in scores.items()}


def score_pairs(model: GPT, pairs: Sequence[ContrastPair]) -> tuple[NDArray[np.float64], Float[Tensor, "P L H"]]:
    """The logit difference (P,) and every head's attention to the antecedent, for P contrast pairs.

    The difference is log p(right) - log p(wrong) in nats, each summed over the answer's tokens; the attention is a head's
    total to the antecedent from the prompt's last position, where the answer is predicted.
    Raises ValueError if a pair is longer than the model's context.
    """
    task, device = pair_task(pairs, {}), model.token_embedding.weight.device
    prompts = {query.item: query for query in reversed(task.queries)}  # the first query of each pair
    logit_diffs = np.zeros(len(pairs))
    attention = torch.empty(len(pairs), model.config.n_layers, model.config.n_heads)
    for start in range(0, len(task.texts), PAIR_ROWS):
        batch = list(range(start, min(start + PAIR_ROWS, len(task.texts))))
        tokens = pad([task.texts[row] for row in batch])
        items = [item for item, query in prompts.items() if query.row in batch]
        rows, positions = [prompts[k].row - start for k in items], [prompts[k].position for k in items]
        is_antecedent = torch.zeros(len(items), tokens.shape[1], device=device)
        for row, item in zip(is_antecedent, items, strict=True):
            row[list(pairs[item].antecedent)] = 1
        index = GatherIndex(task, batch, tokens.shape[1], device)
        with inference_mode(model):
            for number, layer in enumerate(run_layers(model, tokens)):
                pattern = layer.pattern[rows, :, positions]
                attention[items, number] = (pattern * is_antecedent[:, None]).sum(dim=-1).cpu()
            logits = model.lm_head(model.final_norm(layer.resid_post))
        logit_diffs += index.score(index.gather(logits), len(pairs))
    return logit_diffs, attention
