"""Head ablation: how the loss and the logit difference change when a head's output is replaced.

Zero ablation sets the head's output to 0; mean ablation sets it to its mean over a reference set, which leaves later
layers what they are used to (Wang et al. 2023, section 3.1). Effects are positive where ablating hurts. A head without
effect may still do something: another one may do the same (Wang et al. 2023, "backup" heads).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from common.errors import NON_FINITE, UserError
from inspection.ablation_results import AblationEffects, AblationResults, bootstrap
from inspection.activation_cache import LayerActivations, blocks_of, inference_mode, pad, run_layers
from inspection.eval_items import EvalTask, GatherIndex, batches, eval_tasks
from inspection.eval_texts import EvalTexts
from model.gpt import GPT

Scores = NDArray[np.float64]
SEED = 1  # of the bootstrap resamples, and of the random heads of a control
CONTROLS = 4  # random sets of heads, over which the control of several heads is averaged
Head = tuple[int, int]  # (layer, head)


def ablate(
    z: Float[Tensor, "B T HD"], head: int, d_head: int, mean: Float[Tensor, " D"] | None = None
) -> Float[Tensor, "B T HD"]:
    """The concatenated head outputs `z` with those of one head replaced by 0, or by its mean."""
    per_head = z.unflatten(-1, (-1, d_head)).clone()
    per_head[..., head, :] = 0 if mean is None else mean.to(per_head)
    return per_head.flatten(-2)


@contextmanager
def ablated(model: GPT, heads: Iterable[Head], means: Float[Tensor, "L H D"] | None = None) -> Iterator[None]:
    """Replace the outputs of some heads by 0, or by their `means`, in every forward pass of the body; can be nested."""
    with ExitStack() as handles:
        for layer, head in heads:

            def replace(module: object, args: tuple[Tensor, ...], layer: int = layer, head: int = head) -> Tensor:
                return ablate(args[0], head, model.config.d_head, None if means is None else means[layer, head])

            out = blocks_of(model)[layer].attention.out
            handles.enter_context(out.register_forward_pre_hook(replace))
        yield


def mean_outputs(model: GPT, texts: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "L H D"], Float[Tensor, "L C"]]:
    """The mean outputs of each head and of each MLP over all positions of all texts, in the model's precision, on the CPU."""
    with inference_mode(model):
        L, H, D, C = model.config.n_layers, model.config.n_heads, model.config.d_head, model.config.d_model
        heads, mlps = torch.zeros(L, H * D, dtype=torch.float64), torch.zeros(L, C, dtype=torch.float64)
        for batch in batches(model, texts):
            tokens = pad([texts[k] for k in batch])
            is_token = torch.arange(tokens.shape[1]) < torch.tensor([[len(texts[k])] for k in batch])
            for number, layer in enumerate(run_layers(model, tokens)):
                heads[number] += layer.z.cpu()[is_token].double().sum(dim=0)
                mlps[number] += layer.mlp_out.cpu()[is_token].double().sum(dim=0)
    total, dtype = sum(map(len, texts)), model.token_embedding.weight.dtype
    return (heads / total).unflatten(-1, (H, D)).to(dtype), (mlps / total).to(dtype)


def mean_head_outputs(model: GPT, texts: Sequence[Sequence[int]]) -> Float[Tensor, "L H D"]:
    """Each head's mean output over all positions of all texts."""
    return mean_outputs(model, texts)[0]


def _logits(
    model: GPT, number: int, layer: LayerActivations, z: Float[Tensor, "B T HD"], index: GatherIndex
) -> Float[Tensor, "1 S V"]:
    """Logits where they are needed, with `z` as the head outputs of layer `number`."""
    block, *later = blocks_of(model)[number:]
    x = layer.resid_pre
    if not later:  # no later layer attends to the other positions
        x, z = index.gather(x), index.gather(z)
    x = x + block.attention.out(z)
    x = x + block.mlp_out(x)
    for next_block in later:
        x = next_block(x, layer.rope)
    logits: Tensor = model.lm_head(model.final_norm(index.gather(x) if later else x))
    return logits


def ablation_effects(model: GPT, task: EvalTask, on_pass: Callable[[], object] = lambda: None) -> tuple[Scores, Scores]:
    """The scores (N,) of a task's items, and how much each falls by zero and mean ablation of each head, (N, 2, L, H).

    The layers below an ablated head run once for all heads of a layer. Whole and ablated model take the same path from
    there, so that a head that writes nothing has an effect of exactly 0. `on_pass` is called after each ablation.

    Raises UserError (exit code 5) if a score is not finite.
    """
    N, L, H, D = task.n_items, model.config.n_layers, model.config.n_heads, model.config.d_head
    scores, effects = np.zeros(N), np.zeros((N, 2, L, H))
    means = mean_head_outputs(model, task.reference)
    with inference_mode(model):
        for batch in batches(model, task.texts):
            tokens = pad([task.texts[row] for row in batch])
            index = GatherIndex(task, batch, tokens.shape[1], model.token_embedding.weight.device)
            for number, layer in enumerate(run_layers(model, tokens)):
                before = index.score(_logits(model, number, layer, layer.z, index), N)
                if number == 0:
                    scores += before
                for head, k in np.ndindex(H, 2):
                    z = ablate(layer.z, head, D, means[number, head] if k else None)
                    effects[:, k, number, head] += before - index.score(_logits(model, number, layer, z, index), N)
                    on_pass()
    if not (np.isfinite(scores).all() and np.isfinite(effects).all()):
        raise UserError("the model's predictions are not finite, so its heads can't be ablated", NON_FINITE)
    return scores, effects


def loss_increases(model: GPT, texts: Sequence[Sequence[int]], layer: int, head: int) -> list[NDArray[np.float32]]:
    """How much zero ablation of a head raises the loss of each token after the first, (T-1,) in nats, of each text."""
    rows = [torch.tensor([text], device=model.token_embedding.weight.device) for text in texts]
    with inference_mode(model):
        before = [F.cross_entropy(model(x)[0, :-1], x[0, 1:], reduction="none") for x in rows]
        with ablated(model, [(layer, head)]):
            after = [F.cross_entropy(model(x)[0, :-1], x[0, 1:], reduction="none") for x in rows]
    return [np.asarray((b - a).cpu()) for a, b in zip(before, after, strict=True)]


def control_effects(effects: Scores) -> Scores | None:
    """The control: the mean effect (..., H) over the other heads of the layer; None where there is no other."""
    others = effects.shape[-1] - 1
    return (effects.sum(axis=-1, keepdims=True) - effects) / others if others else None


def run_ablations(model: GPT, eval_texts: EvalTexts, step: int = 0, weights_sha256: str = "") -> AblationResults:
    """Ablate every head, by zero and mean, and measure repeated tokens, held-out texts and each kind of contrast pair.

    Means are taken over the measure's own texts (over the prompts of all contrast pairs for every kind of them). `step`
    and `weights_sha256` identify the model in the results.

    Raises UserError (exit code 5) if a prediction of the model is not finite, ValueError if a text does not fit it.
    """
    tasks = eval_tasks(eval_texts)
    ablations = 2 * model.config.n_layers * model.config.n_heads
    total = ablations * sum(len(list(batches(model, task.texts))) for task in tasks)
    measures = {}
    with tqdm(total=total, unit="pass", desc="ablating heads", delay=3, leave=False, disable=None) as bar:
        for task in tasks:
            scores, effects = ablation_effects(model, task, bar.update)
            for name, items in task.measures.items():
                effect = effects[items]
                measures[name] = _summarize(task.unit, scores[items], effect, control_effects(effect))
    return AblationResults(step, weights_sha256, SEED, measures)


def ablate_together(model: GPT, eval_texts: EvalTexts, heads: Sequence[Head]) -> dict[str, AblationEffects]:
    """The effect of ablating some heads at once, by measure; its tables are (3,): value and interval.

    The control is the same ablation of as many other heads of the same layers, the mean over `CONTROLS` random draws;
    there is none where a layer has too few others. Raises UserError (exit code 5) if a score is not finite.
    """
    controls = random_others(heads, model.config.n_heads)
    results = {}
    for task in eval_tasks(eval_texts):
        means, before, effects = mean_head_outputs(model, task.reference), _task_scores(model, task), []
        for chosen in tqdm((heads, *controls), desc="ablating heads", delay=3, leave=False, disable=None):
            for replacement in (None, means):
                with ablated(model, chosen, replacement):
                    effects.append(before - _task_scores(model, task))
        own, *others = np.reshape(effects, (-1, 2, len(before))).swapaxes(1, 2)
        for name, items in task.measures.items():
            control = np.mean(others, axis=0)[items] if others else None
            results[name] = _summarize(task.unit, before[items], own[items], control)
    return results


def random_others(heads: Sequence[Head], n_heads: int) -> list[list[Head]]:
    """`CONTROLS` random draws of as many other heads of the same layers; none if a layer has too few others."""
    rng, chosen = random.Random(SEED), [layer for layer, _ in heads]
    pools = {layer: [(layer, h) for h in range(n_heads) if (layer, h) not in heads] for layer in chosen}
    if any(len(pool) < chosen.count(layer) for layer, pool in pools.items()):
        return []
    draws = range(CONTROLS)
    return [[head for layer, pool in pools.items() for head in rng.sample(pool, chosen.count(layer))] for _ in draws]


def _task_scores(model: GPT, task: EvalTask) -> Scores:
    scores = np.zeros(task.n_items)
    with inference_mode(model):
        for batch in batches(model, task.texts):
            tokens = pad([task.texts[row] for row in batch]).to(model.token_embedding.weight.device)
            index = GatherIndex(task, batch, tokens.shape[1], tokens.device)
            scores += index.score(model.lm_head(index.gather(model.hidden_states(tokens))), task.n_items)
    if not np.isfinite(scores).all():
        raise UserError("the model's predictions are not finite, so its heads can't be ablated", NON_FINITE)
    return scores


def _summarize(unit: str, scores: Scores, effects: Scores, control: Scores | None) -> AblationEffects:
    """Means and intervals from the scores (N,) and effects (N, 2, ...) of N items; a loss is a negative score."""
    values = {"zero": effects[:, 0], "mean": effects[:, 1]}
    if control is not None:
        for k, name in enumerate(("zero", "mean")):
            values |= {f"control_{name}": control[:, k], f"difference_{name}": effects[:, k] - control[:, k]}
    baseline = float(scores.mean()) * (-1 if unit == "nats/token" else 1)
    return AblationEffects(unit, baseline, len(scores), {name: bootstrap(v, SEED) for name, v in values.items()})
