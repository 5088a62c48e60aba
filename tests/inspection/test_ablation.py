"""Taking heads away promises: what changes is known in a model built by hand, and the model is as it was afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import NON_FINITE, UserError
from inspection import ablation as causal
from inspection import eval_items as exams
from inspection.ablation import control_sets, effects, group_effect, mean_outputs, without
from inspection.ablation_results import TABLES, Interval
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import EvalTexts
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, LEAD, PREVIOUS, handmade, repeats
from tests.model.helpers import PRESETS, VOCAB, random_model, random_tokens

V, N, COUNT = 30, 12, 5
"""Vocabulary of the model built by hand; its texts say N tokens twice, and there are COUNT of them."""
REPEATS = tuple(map(tuple, repeats(COUNT, N, V)))
NOTHING = Interval(0.0, 0.0, 0.0)
Patch = pytest.MonkeyPatch
ALL_HEADS = [(layer, head) for layer in range(2) for head in range(3)]


def texts_of(*lengths: int, vocab: int = VOCAB) -> list[tuple[int, ...]]:
    return [tuple(t % vocab for t in random_tokens(1, T, seed=T)[0].tolist()) for T in lengths]


@cache
def watched() -> EvalTexts:
    """Texts, repeats and probes of unlike lengths for the models of `checks.py`."""
    probes = [
        ContrastPair(kind, text, (1,), right, wrong)
        for kind, (right, wrong), lengths in (
            ("one", ((3,), (4,)), (5, 9, 12)),
            ("several", ((3, 5), (4, 5, 6)), (4, 11)),
        )
        for text in texts_of(*lengths)
    ]
    said = [text[1:6] for text in texts_of(6, 7, 8)]
    names = ["held-out 1", "line 1", "held-out 2", "held-out 3"]
    texts = tuple(zip(names, texts_of(9, 15, 13, 2), strict=True))
    return EvalTexts(texts, tuple((0, *one, *one) for one in said), tuple(probes))


def table(found: tuple[tuple[Interval, ...], ...] | None) -> dict[tuple[int, int], Interval]:
    assert found is not None
    return {(layer, head): cell for layer, row in enumerate(found) for head, cell in enumerate(row)}


# What is known of the model built by hand. `test_a_broken_measurement_is_noticed` runs these on broken code.


def check_taking_away_what_matters(attention: AttentionImplementation = "eager") -> None:
    """Without either of the two heads nothing is foretold: ln V. The others change exactly nothing."""
    measured = effects(handmade(V, attention=attention), EvalTexts(repeats=REPEATS)).measures
    assert list(measured) == ["repeats"]
    found = measured["repeats"]
    assert (found.unit, found.count) == ("nats/token", COUNT) and abs(found.baseline) < 1e-5
    zero, control, margin = table(found.zero), table(found.control_zero), table(found.difference_zero)
    for head in ALL_HEADS:
        counts = head in (PREVIOUS, INDUCTION)
        of_layer = PREVIOUS if head[0] == PREVIOUS[0] else INDUCTION
        if not counts:
            assert zero[head] == NOTHING, head
        assert zero[head].value == pytest.approx(math.log(V) if counts else 0, abs=1e-4)
        assert control[head].value == pytest.approx(0 if head == of_layer else math.log(V) / 2, abs=1e-4)
        assert margin[head].value == pytest.approx(zero[head].value - control[head].value, abs=1e-9)
        for one in (zero[head], control[head], margin[head]):
            assert one.low <= one.value <= one.high


def check_means_in_the_place_of_what_matters() -> None:
    """In the induction head's place stands a constant: every token as often as the head says it on average."""
    found = effects(handmade(V), EvalTexts(repeats=REPEATS)).measures["repeats"]
    logits = torch.zeros(V)
    for text in REPEATS:
        logits[list(text[1 : N + 1])] += LEAD / (COUNT * len(text))  # each of its tokens once
    targets = torch.tensor([text[N + 2 :] for text in REPEATS])
    expected = (logits.logsumexp(0) - logits[targets]).mean().item()
    mean = table(found.mean)
    assert abs(expected - math.log(V)) > 0.01  # else it would be the same as putting 0
    assert mean[INDUCTION].value == pytest.approx(expected, abs=1e-4)
    assert mean[PREVIOUS].value == pytest.approx(math.log(V), abs=1e-4)  # all keys alike: the other head rests
    for head in ALL_HEADS:
        if head not in (PREVIOUS, INDUCTION):
            assert mean[head] == NOTHING


def check_a_constant_head_is_its_mean() -> None:
    """A head that hands over the same everywhere: its mean changes exactly nothing, 0 in its place does."""
    model = handmade(V)
    attention = model.blocks[0].attention
    with torch.no_grad():
        for part in attention.qkv.weight.view(3, attention.n_heads, attention.d_head, -1)[2:]:
            part[PREVIOUS[1]] = 0
        values = attention.qkv.bias.view(3, attention.n_heads, attention.d_head)[2, PREVIOUS[1]]
        values[:V] = torch.linspace(0.1, 0.7, V)
        model.blocks[1].attention.qkv.weight.normal_(generator=torch.Generator().manual_seed(1))
    found = effects(model, EvalTexts(repeats=REPEATS)).measures["repeats"]
    assert table(found.mean)[PREVIOUS] == NOTHING
    assert abs(table(found.zero)[PREVIOUS].value) > 0.01


def check_means_leave_padding_out() -> None:
    """Texts read side by side have the mean of texts read alone, every position counted once."""
    for preset in PRESETS:
        model, texts = random_model(preset), texts_of(3, 14, 9, 5)
        sums = [mean_outputs(model, [text]) * len(text) for text in texts]
        torch.testing.assert_close(mean_outputs(model, texts), sum(sums) / 31, rtol=0, atol=1e-6)


def cut_by_hand(model: GPT, layer: int, head: int, mean: Tensor | None) -> GPT:
    """A copy whose attention output does not read the head; what it would make of the mean is added."""
    model = copy.deepcopy(model)
    attention = model.blocks[layer].attention
    D = attention.d_head
    columns = attention.out.weight[:, head * D : (head + 1) * D]
    if mean is not None:
        added = (columns @ mean).detach().clone()
        attention.register_forward_hook(lambda module, args, out: out + added)
    with torch.no_grad():
        columns.zero_()
    return model


def check_heads_by_their_weights(preset: str, attention: AttentionImplementation) -> None:
    """`without` is the same as a matrix that does not read the head."""
    model, tokens = random_model(preset, attention), random_tokens(3, 14)
    means = mean_outputs(model, texts_of(6, 9))
    with torch.no_grad():
        whole = model(tokens)
        for layer, head, given in ((0, 1, None), (0, 2, means), (1, model.config.n_heads - 1, None), (1, 0, means)):
            with without(model, [(layer, head)], given):
                found = model(tokens)
            wanted = cut_by_hand(model, layer, head, None if given is None else means[layer, head])(tokens)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            assert (found - whole).abs().max() > 1e-3  # the head did something


def losses(model: GPT, text: tuple[int, ...], first: int) -> float:
    logits = model(torch.tensor([text]))[0, first - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(text[first:])).item()


def lead(model: GPT, probe: ContrastPair) -> float:
    def log_p(answer: tuple[int, ...]) -> float:
        text = probe.tokens + answer
        return -losses(model, text, len(probe.tokens)) * len(answer)

    return log_p(probe.right) - log_p(probe.wrong)


def reference(measure: str) -> list[tuple[int, ...]]:
    """What the means of a measure are taken over."""
    watch = watched()
    held_out = [text for name, text in watch.texts if name.startswith("held-out")]
    return {"repeats": list(watch.repeats), "corpus": held_out}.get(measure, [p.tokens for p in watch.probes])


def scores_one_by_one(model: GPT, measure: str) -> list[float]:
    """The items of a measure by its definition, each read alone; higher is better."""
    if measure == "repeats":
        return [-losses(model, text, 7) for text in reference(measure)]  # 0, then 5 tokens twice: r2 stands at 7
    if measure == "corpus":
        return [-losses(model, text, 1) for text in reference(measure)]
    return [lead(model, probe) for probe in watched().probes if f"logit_diff.{probe.kind}" == measure]


def check_the_fast_way_is_the_plain_way(preset: str, attention: AttentionImplementation) -> None:
    """Every effect is what `without` and the definition of the measure give, item by item, text by text."""
    model = random_model(preset, attention)
    found = effects(model, watched()).measures
    assert list(found) == ["repeats", "corpus", "logit_diff.one", "logit_diff.several"]
    for name, one in found.items():
        before, means = scores_one_by_one(model, name), mean_outputs(model, reference(name))
        sign = -1 if one.unit == "nats/token" else 1
        assert one.baseline == pytest.approx(sign * sum(before) / len(before), abs=2e-5)
        assert one.count == len(before)
        for layer, head, kind in ((0, 2, "zero"), (0, 0, "mean"), (1, 1, "mean")):
            with without(model, [(layer, head)], means if kind == "mean" else None):
                after = scores_one_by_one(model, name)
            fall = sum(a - b for a, b in zip(before, after, strict=True)) / len(after)
            assert getattr(one, kind)[layer][head].value == pytest.approx(fall, abs=4e-5)


def check_nothing_is_left_behind() -> None:
    """No hook, flag, gradient or number of the model moves, whether the body ends well or not."""
    model, tokens = random_model("gpt2", dropout=0.3).train(), random_tokens(1, 9)
    model.blocks[0].mlp.eval()  # put to rest on purpose
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError), without(model, [(0, 1), (1, 2)]):
        raise KeyError
    with without(model, [(0, 0)]):
        pass
    effects(model, watched())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert torch.equal(model(tokens), random_model("gpt2")(tokens))


CHECKS: dict[str, Callable[[], None]] = {
    "what matters": check_taking_away_what_matters,
    "what matters, sdpa": partial(check_taking_away_what_matters, "sdpa"),
    "means": check_means_in_the_place_of_what_matters,
    "constant": check_a_constant_head_is_its_mean,
    "padding": check_means_leave_padding_out,
    "left behind": check_nothing_is_left_behind,
    **{
        f"weights, {p}, {f}": partial(check_heads_by_their_weights, p, f)
        for p in PRESETS
        for f in ATTENTION_IMPLEMENTATIONS
    },
    **{
        f"plain, {p}": partial(check_the_fast_way_is_the_plain_way, p, ATTENTION_IMPLEMENTATIONS[k % 2])
        for k, p in enumerate(PRESETS)
    },
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


def taking(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    """`take_away(outputs, heads, width, means)` through `change(the real one, *its arguments)`."""

    def apply(patch: Patch) -> None:
        real = causal.take_away
        patch.setattr(causal, "take_away", lambda *args, **named: change(real, *args, **named))

    return apply


def next_head(real: Any, outputs: Tensor, heads: Any, width: int, means: Any = None) -> Tensor:
    count = outputs.shape[-1] // width
    return real(outputs, [(head + 1) % count for head in heads], width, means)


def features_first(real: Any, outputs: Tensor, heads: Any, width: int, means: Any = None) -> Tensor:
    """(H D) taken for (D H)."""
    apart = outputs.unflatten(-1, (width, -1)).clone()
    apart[..., list(heads)] = 0 if means is None else means[list(heads)].T
    return apart.flatten(-2)


def in_place(real: Any, outputs: Tensor, heads: Any, width: int, means: Any = None) -> Tensor:
    outputs.copy_(real(outputs, heads, width, means))
    return outputs


def of_causal(name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Another function of `causal.py` through `change(the real one, *its arguments)`."""

    def apply(patch: Patch) -> None:
        real = getattr(causal, name)
        patch.setattr(causal, name, lambda *args, **named: change(real, *args, **named))
        if name == "mean_outputs":
            patch.setitem(globals(), name, getattr(causal, name))

    return apply


def filled_up(real: Any, model: GPT, texts: Any) -> Tensor:
    longest = max(map(len, texts))
    return real(model, [(*text, *[0] * (longest - len(text))) for text in texts])


def asked(change: Callable[[exams.Asked], exams.Asked]) -> Callable[[Patch], None]:
    def broken(real: Any, *args: Any) -> list[exams.EvalTask]:
        return [replace(exam, asked=[change(one) for one in exam.asked]) for exam in real(*args)]

    return of_causal("exams_of", broken)


MUTANTS: dict[str, tuple[Callable[[Patch], None], list[str]]] = {
    "the next head is taken": (taking(next_head), ["what matters", "weights, gpt2, sdpa", "weights, qwen3, eager"]),
    "heads are cut the other way": (
        taking(features_first),
        ["weights, glass, eager", "weights, qwen3, sdpa"],
    ),
    "what was taken away stays away": (taking(in_place), ["what matters"]),
    "means are ignored": (
        taking(lambda real, outputs, heads, width, means=None: real(outputs, heads, width)),
        ["means", "constant", "weights, glass, sdpa"],
    ),
    "nothing is taken away": (
        taking(lambda real, outputs, *rest, **named: outputs),
        ["what matters", "means", "weights, gpt2, eager"],
    ),
    "means of another layer": (
        of_causal("mean_outputs", lambda real, *args: real(*args).flip(0)),
        ["means", "constant"],
    ),
    "means over the padding too": (of_causal("mean_outputs", filled_up), ["padding"]),
    "means of the first text": (of_causal("mean_outputs", lambda real, m, texts: real(m, texts[:1])), ["padding"]),
    "the stream goes on in another layer": (
        of_causal("_resume", lambda real, model, number, *rest: real(model, 1 - number, *rest)),
        ["what matters"],
    ),
    "the stream goes on a layer too late": (
        of_causal("_resume", lambda real, model, number, *rest: real(model, 1, *rest)),
        ["plain, gpt2"],
    ),
    "hooks stay": (
        lambda patch: patch.setattr("torch.utils.hooks.RemovableHandle.remove", lambda self: None),
        ["left behind"],
    ),
    "the control counts the head itself": (
        of_causal("control_of", lambda real, values: values.mean(axis=2, keepdims=True) + 0 * values),
        ["what matters", "what matters, sdpa"],
    ),
    "the control is another layer's": (
        of_causal("control_of", lambda real, values: real(values)[:, :, ::-1]),
        ["what matters"],
    ),
    "the sign is turned": (
        asked(lambda one: one._replace(weight=-one.weight)),
        ["what matters"],
    ),
    "predictions are looked up a place too late": (
        asked(lambda one: one._replace(place=max(0, one.place - 1))),
        ["what matters"],
    ),
    "the wrong answer counts as right": (
        asked(lambda one: one._replace(weight=abs(one.weight))),
        ["plain, glass"],
    ),
}
CASES = [(name, check) for name, (_, watchers) in MUTANTS.items() for check in watchers]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_a_broken_measurement_is_noticed(name: str, check: str, monkeypatch: Patch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check]()


# The rest of the promises.


def test_the_inner_one_of_two_has_the_last_word() -> None:
    model, tokens = random_model("glass"), random_tokens(1, 9)
    means = mean_outputs(model, texts_of(9))
    with without(model, [(0, 1)]), without(model, [(1, 2)]), without(model, [(0, 2)]):
        one_by_one = model(tokens)
    with without(model, [(0, 1), (0, 2), (1, 2)]):
        assert torch.equal(model(tokens), one_by_one)
    with without(model, [(0, 1)], means):
        alone = model(tokens)
    with without(model, [(0, 1)]):
        with without(model, [(0, 1)], means):
            assert torch.equal(model(tokens), alone)
        assert not torch.equal(model(tokens), alone)


def test_a_mean_of_nothing_is_zero() -> None:
    model, tokens = random_model("qwen3"), random_tokens(1, 9)
    with without(model, [(1, 4)]):
        zero = model(tokens)
    with without(model, [(1, 4)], torch.zeros_like(mean_outputs(model, texts_of(9)))):
        assert torch.equal(model(tokens), zero)


@pytest.mark.parametrize("head", [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_head_that_is_not_there_is_named(head: tuple[int, int]) -> None:
    model = random_model("glass")
    with pytest.raises(ValueError, match="no head L"), without(model, [(0, 0), head]):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_measures_without_two_items_are_absent() -> None:
    model, whole = random_model("glass"), watched()
    assert effects(model, EvalTexts()).measures == {}
    few = EvalTexts(whole.texts[:2], whole.repeats[:1], (*whole.probes[:2], whole.probes[3]))
    assert list(effects(model, few).measures) == ["logit_diff.one"]
    with pytest.raises(ValueError, match="no tokens"):
        mean_outputs(model, [])
    with pytest.raises(ValueError, match="not two items"):
        group_effect(model, few, [(0, 0)], "corpus")


def test_the_first_probes_of_each_kind_that_fit_are_asked() -> None:
    whole = watched()
    long = replace(whole.probes[0], tokens=texts_of(16)[0], right=(1, 2))
    found = effects(random_model("glass"), EvalTexts(probes=(long, *whole.probes)), per_kind=2).measures
    assert {name: one.count for name, one in found.items()} == {"logit_diff.one": 2, "logit_diff.several": 2}
    first = effects(random_model("glass"), EvalTexts(probes=(*whole.probes[:2], *whole.probes[3:]))).measures
    assert found["logit_diff.one"].baseline == pytest.approx(first["logit_diff.one"].baseline, abs=1e-5)


def test_a_layer_of_one_head_has_no_control() -> None:
    found = effects(random_model("glass", n_heads=1), watched()).measures["corpus"]
    assert len(found.zero[0]) == 1
    assert found.control_zero is found.control_mean is found.difference_zero is found.difference_mean is None


def test_the_seed_decides_the_intervals_alone() -> None:
    model, probe = random_model("gpt2"), watched().probes[0]
    watch = EvalTexts(probes=tuple(replace(probe, tokens=text) for text in texts_of(*range(3, 15))))
    first, again, other = (effects(model, watch, seed=seed) for seed in (3, 3, 4))
    assert first == again and first.seed == 3
    cells = [table(getattr(e.measures["logit_diff.one"], name)) for e in (first, other) for name in TABLES]
    pairs = [(a[h], b[h]) for a, b in zip(cells[:6], cells[6:], strict=True) for h in a]
    assert all(a.value == b.value for a, b in pairs) and any(a != b for a, b in pairs)


def test_weights_in_half_precision_are_read_in_fp32() -> None:
    model = random_model("qwen3")
    half = copy.deepcopy(model).bfloat16()
    watch = EvalTexts(watched().texts)
    wide = effects(copy.deepcopy(half).float(), watch)
    assert effects(half, watch) == wide and half.lm_head.weight.dtype == torch.bfloat16


def test_a_model_that_is_not_finite_is_one_line() -> None:
    model = random_model("glass")
    with torch.no_grad():
        model.final_norm.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite") as caught:
        effects(model, watched())
    assert caught.value.exit_code == NON_FINITE


def test_a_text_that_does_not_fit_is_refused() -> None:
    model = random_model("glass")
    for text in (texts_of(17)[0], (1, VOCAB, 2)):
        with pytest.raises(ValueError, match="the model"):
            effects(model, EvalTexts((("held-out 1", text), ("held-out 2", text))))


def test_progress_counts_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    effects(random_model("glass"), watched(), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_many_texts_in_several_passes(monkeypatch: Patch) -> None:
    model, watch = random_model("gpt2"), EvalTexts(watched().texts, probes=watched().probes[2:])
    at_once = effects(model, watch).measures
    monkeypatch.setattr(exams, "READ_AT_ONCE", 20)
    for name, one in effects(model, watch).measures.items():
        for head, cell in table(one.difference_mean).items():
            assert cell.value == pytest.approx(table(at_once[name].difference_mean)[head].value, abs=2e-5)


def test_a_pass_holds_no_more_than_it_should(monkeypatch: Patch) -> None:
    monkeypatch.setattr(exams, "READ_AT_ONCE", 20)
    texts = texts_of(9, 3, 14, 4, 30, 2, 9)
    passes = list(exams.batches(random_model("gpt2"), texts))
    assert sorted(k for batch in passes for k in batch) == list(range(len(texts)))
    padded = [len(batch) * max(len(texts[k]) for k in batch) for batch in passes]
    assert max(size for size, batch in zip(padded, passes, strict=True) if len(batch) > 1) <= 20 and len(passes) == 4


def test_a_question_that_begins_another_is_read_with_it() -> None:
    texts = [(1, 2), (1, 2, 3), (1, 2, 4), (1,), (2, 2), (2, 2), (1, 2, 3, 4)]
    kept, rows = exams.shared(texts)
    assert sorted(kept) == [(1, 2, 3, 4), (1, 2, 4), (2, 2)]
    assert all(kept[rows[text]][: len(text)] == text for text in texts)


# Several heads together.


def test_a_group_beside_as_many_others() -> None:
    model, watch = handmade(V), EvalTexts(repeats=REPEATS)
    alone = group_effect(model, watch, [INDUCTION], "repeats")
    assert alone.drawn == (((1, 0),), ((1, 2),)) and alone.disjoint and alone.unit == "nats/token"
    assert alone.zero.value == pytest.approx(math.log(V), abs=1e-4)
    assert alone.control_zero == alone.control_mean == NOTHING and alone.difference_zero == alone.zero
    two = group_effect(model, watch, [(1, 2), INDUCTION], "repeats")
    assert two.drawn == (((1, 0), (1, 1)), ((1, 0), (1, 2))) and not two.disjoint
    assert two.control_zero is not None and two.control_zero.value == pytest.approx(math.log(V) / 2, abs=1e-4)
    every = group_effect(model, watch, [(1, 0), (1, 1), (1, 2)], "repeats")
    assert every.drawn == () and every.control_zero is every.difference_mean is None
    assert every.zero.value == pytest.approx(math.log(V), abs=1e-4)


def test_a_group_of_one_is_the_head() -> None:
    model = random_model("gpt2")
    found = effects(model, watched()).measures["logit_diff.several"]
    one = group_effect(model, watched(), [(0, 2)], "logit_diff.several")
    for name in TABLES:
        assert getattr(one, name).value == pytest.approx(getattr(found, name)[0][2].value, abs=1e-9)


def test_a_group_has_one_layer() -> None:
    for heads in ([], [(0, 0), (1, 0)]):
        with pytest.raises(ValueError, match="one layer"):
            group_effect(random_model("glass"), watched(), heads, "corpus")
    with pytest.raises(ValueError, match="no head L5H0"):
        group_effect(random_model("glass"), watched(), [(5, 0)], "corpus")


@given(st.integers(1, 12), st.data())
def test_control_sets_are_others_where_there_are_enough(n_heads: int, data: st.DataObject) -> None:
    group = data.draw(st.sets(st.integers(0, n_heads - 1), min_size=1))
    draws, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    drawn = control_sets(sorted(group), n_heads, draws, seed)
    others = set(range(n_heads)) - group
    assert drawn == control_sets(sorted(group), n_heads, draws, seed)
    assert len(set(drawn)) == len(drawn) <= draws and bool(drawn) == bool(others)
    for one in map(set, drawn):
        assert len(one) == len(group) and one <= set(range(n_heads))
        assert one <= others if len(others) >= len(group) else others < one
    if others:
        size = math.comb(len(others), len(group)) or math.comb(len(group), len(group) - len(others))
        assert len(drawn) == min(draws, size)
