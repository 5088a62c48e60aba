"""Every head scored at once: the formulas of `metrics.py`, each on the texts that suit it.

Called at every evaluation of a training, so it is cheap: three kinds of texts, a padded batch or two each. No layer's
patterns outlive the moment in which the layer shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from inspection import head_scores as metrics
from inspection.activation_cache import observe, pad
from inspection.contrast_pairs import ContrastPair, measure
from inspection.eval_texts import EvalTexts
from inspection.registry import ANTECEDENT
from model.gpt import GPT

Formula = Callable[[Float[Tensor, "H T T"], Tensor], Float[Tensor, " H"]]
"""From a text's pattern and tokens to a score for each head of a layer."""

ON_REPEATS: dict[str, Formula] = {
    "previous_token": lambda pattern, tokens: metrics.previous_token(pattern),
    "duplicate_token": metrics.duplicate_token,
    "induction": metrics.induction,
}
ON_TEXTS: dict[str, Formula] = {
    "first_token": lambda pattern, tokens: metrics.first_token(pattern),
    "entropy": lambda pattern, tokens: metrics.relative_entropy(pattern),
    "distance": lambda pattern, tokens: metrics.mean_distance(pattern),
}


def head_scores(model: GPT, watch: EvalTexts, per_kind: int = 16) -> dict[str, Float32[Tensor, "L H"]]:
    """The scores of `registry.py`, on the CPU: means over the texts that have anything to measure.

    What cannot be measured is left out: a score of which `watch` has no texts, or that is not a finite number.

    Args:
        watch: repeats of random tokens, held-out texts and probes, none longer than the context.
        per_kind: how many probes of each kind are asked, the first ones.
    """
    found = {**_averaged(model, watch.repeats, ON_REPEATS)}
    found |= _averaged(model, [tokens for _, tokens in watch.texts], ON_TEXTS)
    found["copying"] = metrics.copying(model)
    asked: dict[str, list[ContrastPair]] = {}
    for probe in watch.probes:
        asked.setdefault(probe.kind, []).append(probe)
    probes = [probe for kind in asked.values() for probe in kind[:per_kind]]
    if probes:
        _, weights = measure(model, probes)
        for kind in asked:
            found[ANTECEDENT + kind] = weights[[k for k, probe in enumerate(probes) if probe.kind == kind]].mean(dim=0)
    return {name: table for name, table in found.items() if table.isfinite().all()}


def _averaged(
    model: GPT, texts: Sequence[Sequence[int]], formulas: dict[str, Formula]
) -> dict[str, Float32[Tensor, "L H"]]:
    """Each score's mean over the texts; texts in which it is nan do not count."""
    if not texts:
        return {}
    tokens = [torch.tensor(text, device=model.token_embedding.weight.device) for text in texts]
    layers: dict[str, list[Tensor]] = {name: [] for name in formulas}

    def watch(layer: int, weights: Float[Tensor, "B H T T"]) -> None:
        for name, formula in formulas.items():
            each = [formula(w[:, : len(t), : len(t)], t) for w, t in zip(weights, tokens, strict=True)]
            layers[name].append(torch.stack(each).nanmean(dim=0))

    observe(model, pad(texts), watch)
    return {name: torch.stack(scores).cpu() for name, scores in layers.items()}
