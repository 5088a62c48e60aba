"""Direct logit attribution and the logit lens: the parts are the model's own and add up to its logit."""

import copy
from itertools import cycle

import pytest
import torch

from inspection.attribution import direct_logit_attribution, logit_lens
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from tests.inspection.handmade import LEAD, handmade, repeats
from tests.model.helpers import SHAPES, VOCAB, random_model, random_tokens

T = 11
TEXT = random_tokens(1, T)[0]


@pytest.mark.parametrize(("preset", "attention"), list(zip(SHAPES, cycle(ATTENTION_IMPLEMENTATIONS), strict=False)))
def test_parts_add_up_to_the_logit(preset: str, attention: AttentionImplementation) -> None:
    """Within 1e-4 in fp32, and within 1e-9 in double precision."""
    single = random_model(preset, attention)
    for model, tolerance in ((single, 1e-4), (copy.deepcopy(single).double(), 1e-9)):
        for length, token in ((1, 3), (5, 60), (T, 7)):
            with torch.no_grad():
                logits = model(TEXT[None, :length])[0, -1]
            _, parts = direct_logit_attribution(model, TEXT[:length], token)
            assert abs(sum(parts.values()) - logits[token].item()) < tolerance
            assert direct_logit_attribution(model, TEXT[:length])[0] == logits.argmax()


def test_induction_head_writes_the_whole_logit() -> None:
    """The embedding's parts cancel."""
    model, (text,) = handmade(30), repeats(1, 12)
    for position in (14, 20, 23):
        token, parts = direct_logit_attribution(model, torch.tensor(text[: position + 1]))
        assert token == text[position + 1]
        for label, value in parts.items():
            assert value == pytest.approx(LEAD if label == "L1H1" else 0, abs=1e-3), label


@pytest.mark.parametrize("preset", SHAPES)
def test_logit_lens_ends_with_the_models_logits(preset: str) -> None:
    model = random_model(preset)
    lens = logit_lens(model, TEXT)
    with torch.no_grad():
        assert lens.shape == (3, T, VOCAB) and torch.equal(lens[-1], model(TEXT[None])[0])
        embedded = model.token_embedding(TEXT)
        if model.position_embedding is not None:
            embedded = embedded + model.position_embedding(torch.arange(T))
        if model.ngram_embedding is not None:
            embedded = embedded + model.ngram_embedding(TEXT[None])[0]
        torch.testing.assert_close(lens[0], model.lm_head(model.final_norm(embedded)), rtol=0, atol=1e-5)
