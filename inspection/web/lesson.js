// Five cards about the run's strongest finding, on the text where it shows: find the head, switch it off, see another word
// come, go back to step 0, put everything back. Without a supported finding whose text is in the page there are none.

const LESSON = page.model && page.findings.find(({ supported, text }) => supported && text !== null);
const lesson = { card: -1, text: "" };

// Shows a card, and what it speaks of.
async function showCard(card) {
  const [layer, head] = LESSON.head;
  if (card === 0) {
    const stored = await loadText(0, run.steps.length - 1, LESSON.text, layer);
    const end = LESSON.query === null || LESSON.query < 0 ? stored.T : LESSON.query + 1;
    const ids = Array.from(stored.tokens.slice(0, end));
    lesson.text = await backend.decode(ids.slice(ids[0] === page.model.prefix[0] ? page.model.prefix.length : 0));
  }
  lesson.card = card;
  const off = card === 1 || card === 2 ? headName(layer, head) : "";
  const step = nearestStep(0, card === 3 ? 0 : run.steps.length - 1, OWN);
  await change({ text: OWN, own: lesson.text, query: Infinity, key: -1, layer, head, score: LESSON.score, step, off, mode: "zero" });
}

// What a card says, with the numbers that the model computes now.
function cardText(card) {
  const word = ({ logits }) => {
    const token = largest(logits);
    return [tokenLabel(token), ` (${percentOf(probabilities(logits)[token])})`];
  };
  const [name, key] = [headName(...LESSON.head), selectedKey()];
  const weight = percentOf(storedRow(state.query)[key]);
  const seen = [tokenLabel(view.tokens[state.query]), ` gives ${weight} of its attention to `, tokenLabel(view.tokens[key])];
  return [
    ["Find the head that looks back. ", `In ${name}, `, ...seen, ". The model expects ", ...word(view), "."],
    ["Switch it off. ", `Without ${name} the model expects `, ...word(view), ", before it expected ", ...word(view.before ?? view), "."],
    ["See what else changed. ", "The list of predicted next tokens shows every probability before and now; the logit lens, ",
      "after which layer the answer is lost."],
    ["Go back to the start. ", `At step ${stepNumber(view.step)} `, ...seen, ", and the model expects ", ...word(view),
      ". Move the step: when does it change?"],
    ["Put it back. ", "Everything is on again, at the last step: ", ...word(view), ". Now try another head, or your own words."],
  ][card];
}

function drawLesson() {
  const open = lesson.card >= 0 && state.text === OWN;
  byId("lesson").hidden = !open;
  byId("start-lesson").hidden = !LESSON || open;
  if (!open) return;
  const [title, ...text] = cardText(lesson.card);
  byId("lesson-card").replaceChildren(create("strong", {}, `${lesson.card + 1} of 5. ${title}`), ...text);
  byId("lesson-back").disabled = lesson.card === 0;
  byId("lesson-next").textContent = lesson.card === 4 ? "Close" : "Next";
}

const closeLesson = () => { lesson.card = -1; drawLesson(); };
const LESSON_BUTTONS = {
  "start-lesson": () => showCard(0),
  "lesson-back": () => showCard(lesson.card - 1),
  "lesson-next": () => (lesson.card === 4 ? closeLesson() : showCard(lesson.card + 1)),
  "lesson-close": closeLesson,
};
