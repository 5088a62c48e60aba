"""Your own text in the page: typing, steps, switching off, ranking, links, the saved page, the lesson, hostile text."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import OpenPage, View
from tests.browser.model_run import STEPS, make_page

pytestmark = pytest.mark.browser
OWN = "text=your+own+text"
MINUS = "\N{MINUS SIGN}"
HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "\u202eabc", "\u0000\u001b[31m",
    "x" * 100_000, "${window.hacked = 1}", "😀" * 300, "&lt;b&gt; \" '",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_page(folder, "glass", "bpe")
    return folder / "attention.html"


@pytest.fixture
def view(path: Path, open_page: OpenPage) -> View:
    view = open_page(path)
    view.page.fill("#own", "Mia the fox met")
    view.wait_for(OWN, "own=Mia")
    return view


def predictions(view: View) -> dict[int, float]:
    rows = view.page.eval_on_selector_all(
        "#predictions li", "rows => rows.map(({ dataset }) => [dataset.token, dataset.value])"
    )
    return {int(token): float(p) for token, p in rows}


def test_typing_follows_and_steps_change_the_model(view: View) -> None:
    T = view.page.evaluate("view.T")
    assert view.page.locator("#text .tok").count() == T and view.page.evaluate("state.query") == T - 1
    last = predictions(view)
    assert list(last.values()) == sorted(last.values(), reverse=True)
    view.page.focus("#text")
    view.press("[", f"step={STEPS[1]}")
    assert predictions(view) != last and view.page.input_value("#own") == "Mia the fox met"
    view.page.focus("#own")
    view.page.keyboard.type(" v[]xm")  # letters of a text are no commands
    view.wait_for("own=Mia+the+fox+met+v%5B%5Dxm", f"step={STEPS[1]}")


def test_nothing_is_drawn_while_another_text_is_loading(view: View) -> None:
    view.page.evaluate(
        """() => { const { run } = backend;
        backend.run = async (request) => { await new Promise((done) => setTimeout(done, 1000)); return run(request); }; }"""
    )
    view.page.fill("#own", "Mia the fox met Tom")
    view.page.set_viewport_size({"width": 1000, "height": 700})
    view.page.hover("#matrix")
    view.wait_for("own=Mia+the+fox+met+Tom")


def test_typing_replaces_the_example_only(path: Path, open_page: OpenPage) -> None:
    view = open_page(path)
    assert view.page.input_value("#own")
    for expected in ("Mia", "MiaMia"):
        view.page.click("#own", position={"x": 300, "y": 12})  # after the text
        view.page.wait_for_timeout(50)
        view.page.keyboard.type("Mia")
        assert view.page.input_value("#own") == expected
        view.page.locator("#own").blur()


def test_characters_without_a_token_are_named(tmp_path: Path, open_page: OpenPage) -> None:
    make_page(tmp_path, "gpt2", "char")
    view = open_page(tmp_path / "attention.html")
    view.page.fill("#own", "a ẞ b ẞ<i>😀")
    view.wait_for(OWN)
    assert "No token has the characters" in view.text("#message") and "ẞ" in view.text("#message")
    assert view.text("#message").count("ẞ") == 1 and "😀" in view.text("#message")
    view.page.fill("#own", "a b")
    view.wait_for("own=a+b")
    assert view.page.locator("#message").is_hidden()


def test_switching_off_shows_before_and_after(view: View) -> None:
    before = predictions(view)
    view.page.focus("#text")
    view.press("x", "off=L1H1")
    after = predictions(view)
    assert after != before and "off: L1H1" in view.text("#experiments")
    was = {token: p for token, p in before.items() if token in after}
    for token, p in was.items():
        assert f"was {100 * p:.1f} %" in view.text(f"#predictions [data-token='{token}']").replace("\u00a0", " ")
    view.press("m", "off=L1H1%2CL1+MLP")
    view.page.select_option("[name=mode]", "mean")
    view.wait_for("mode=mean")
    assert view.page.locator("#grid td.off").count() == 1
    view.page.click("#all-on")
    view.page.wait_for_selector("html:not([data-drawn*='off='])", state="attached")
    assert predictions(view) == before


def test_ranking_names_the_head_whose_ablation_costs_most(view: View) -> None:
    view.page.click("#rank-heads")
    view.page.wait_for_selector("#ranking:not([hidden])")
    falls = view.page.evaluate(
        """async () => { const [ids, step, query] = [await ownTokens(), run.steps[view.step].step, state.query];
        const run_ = (off) => backend.run({ step, ids, query, layer: -1, off });
        const logP = async (off) => softmax(Float64Array.from((await run_(off)).logits)).map(Math.log);
        const [whole, falls] = [await logP(null), {}];
        for (const head of allHeads.map(({ layer, head }) => headName(layer, head)))
          falls[head] = whole[largest(whole)] - (await logP({ [head]: "zero" }))[largest(whole)];
        return falls; }"""
    )
    first = view.page.inner_text("#ranking button").split()
    assert first[0] == max(falls, key=falls.__getitem__)
    assert float(first[1].replace(MINUS, "-")) == pytest.approx(-max(falls.values()), abs=0.006)


def test_pinned_tokens_and_alternatives(view: View) -> None:
    for k in (0, 1):
        view.page.locator("#predictions .pin").nth(k).click()
    first, second = list(predictions(view))[:2]
    logits = view.page.evaluate("Array.from(view.logits)")
    shown = view.page.inner_text("#difference strong").replace(MINUS, "-")
    assert float(shown) == pytest.approx(logits[first] - logits[second], abs=0.006)
    view.page.locator("#predictions [data-write]").nth(1).click()
    view.page.wait_for_function(f"() => view.tokens.at(-1) === {second}")
    assert view.page.input_value("#own").startswith("Mia the fox met")


def test_link_and_saved_page_show_the_same(view: View, path: Path, open_page: OpenPage, tmp_path: Path) -> None:
    view.page.focus("#text")
    view.press("[", f"step={STEPS[1]}")
    view.press("x", "off=L1H1")
    shown, hash = predictions(view), view.page.evaluate("stateToHash()")
    assert predictions(open_page(path, hash)) == shown
    with view.page.expect_download() as download:
        view.page.click("#save-page")
    download.value.save_as(tmp_path / "saved.html")
    saved = open_page(tmp_path / "saved.html")
    assert saved.page.input_value("#own") == "Mia the fox met" and predictions(saved) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str, path: Path, open_page: OpenPage) -> None:
    view = open_page(path)
    view.page.fill("#own", text)
    view.wait_for(OWN)
    assert view.page.evaluate("window.hacked") is None and view.page.locator("#text img").count() == 0
    assert view.page.evaluate("view.T") <= 128


def test_lone_surrogates_are_replaced(path: Path, open_page: OpenPage) -> None:
    view = open_page(path)
    view.page.evaluate('change({ text: OWN, own: "a\\ud800b", query: Infinity, key: -1 })')
    view.wait_for(OWN)
    assert view.page.evaluate("Array.from(view.tokens)") == view.page.evaluate(
        '[...page.model.prefix, ...backend.encode("a\\ufffdb")]'
    )


def test_lesson(path: Path, open_page: OpenPage) -> None:
    view = open_page(path)
    view.page.click("#start-lesson")
    words: list[Any] = []
    for k, parts in enumerate([("step=20",), ("off=L1H1",), ("off=L1H1",), ("step=0",), ("step=20",)]):
        view.wait_for(OWN, "head=L1H1", *parts)
        view.page.wait_for_function(
            f"() => document.getElementById('lesson-card').innerText.startsWith('{k + 1} of 5')"
        )
        words.append((view.text("#lesson-card"), "off=" in view.page.evaluate("root.dataset.drawn")))
        view.page.click("#lesson-next")
    assert [off for _, off in words] == [False, True, True, False, False]
    assert view.page.locator("#lesson").is_hidden() and view.page.locator("#start-lesson").is_visible()
    top = f"{100 * max(predictions(view).values()):.1f}"
    assert top in words[0][0] and top in words[4][0] and "Without L1H1" in words[1][0]


def test_page_without_a_model_has_no_experiments(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path)
    assert view.page.locator("#own").is_hidden() and view.page.locator("#experiments").is_hidden()
    assert view.page.evaluate("page.model") is None
