// What is looked at: one object, which the address's hash mirrors, so that a view can be kept as a link.

const run = about.runs[0];
const second = about.runs[1] || null;

const state = {
  text: 0, // number of the text
  step: run.steps.length - 1, // number of the step, not the step itself
  layer: 0,
  head: 0,
  query: 0, // the token that reads, counted from the first that the page holds
  key: -1, // a token that is read; -1: the one that is read most
  score: "",
  weigh: false, // weights times the lengths of the values
  against: "", // "": compare with nothing; "400": with this run's step 400; "other": with the other run
  pinned: false,
  theme: "", // "": as the system says
};

function scoreNames(step) {
  return Object.keys(run.steps[step].scores);
}

// The head that a table of scores likes best: [layer, head].
function bestHead(table) {
  let best = [0, 0];
  let most = -Infinity;
  table.forEach((row, l) => row.forEach((value, h) => {
    if (value !== null && value > most) [most, best] = [value, [l, h]];
  }));
  return best;
}

function stepNumber(k) {
  return run.steps[k].step;
}

// The view that one first sees: the last step, and the head that the page's sentence speaks of.
function firstView() {
  const last = run.steps.length - 1;
  const shown = run.steps[last].texts.findIndex((entry) => entry);
  Object.assign(state, { step: last, text: Math.max(0, shown), query: -1, key: -1, weigh: false, against: "" });
  const names = scoreNames(last);
  const claim = about.findings.find((one) => one && one.is_supported) || about.findings[0];
  state.score = claim && names.includes(claim.score) ? claim.score : names[0] || "";
  const table = run.steps[last].scores[state.score];
  [state.layer, state.head] = table ? bestHead(table) : [0, 0];
  const [l, h] = (claim && Array.isArray(claim.head) && claim.head) || [-1, -1];
  if (l >= 0 && l < run.layers && h >= 0 && h < run.heads) [state.layer, state.head] = [l, h];
}

function whole(text, below) {
  return /^\d{1,9}$/.test(text || "") && Number(text) < below ? Number(text) : -1;
}

// Who may be compared with: this run's steps, and the other run.
function comparable(against) {
  if (against === "other") return second !== null;
  return run.steps.some((entry) => String(entry.step) === against);
}

// What a hash says, as changes of the state. What it says wrongly is passed over.
function fromHash(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const found = {};
  const text = about.texts.indexOf(said.get("text"));
  if (text >= 0 && nearestStep(0, run.steps.length - 1, text) >= 0) found.text = text;
  const step = run.steps.findIndex((entry) => String(entry.step) === said.get("step"));
  if (step >= 0) found.step = step;
  const [, layer, head] = /^L(\d{1,4})H(\d{1,4})$/.exec(said.get("head") || "") || [];
  if (whole(layer, run.layers) >= 0 && whole(head, run.heads) >= 0) {
    Object.assign(found, { layer: Number(layer), head: Number(head) });
  }
  const shown = found.text ?? state.text;
  const T = textAt(0, nearestStep(0, found.step ?? state.step, shown), shown).tokens;
  const query = whole(said.get("query"), T);
  if (query >= 0) found.query = query;
  const key = whole(said.get("key"), query + 1);
  if (key >= 0) found.key = key;
  if (Object.hasOwn(about.scores, said.get("score") || "")) found.score = said.get("score");
  if (comparable(said.get("against"))) found.against = said.get("against");
  for (const flag of ["weigh", "pinned"]) if (said.get(flag) === "1") found[flag] = true;
  if (["light", "dark"].includes(said.get("theme"))) found.theme = said.get("theme");
  return found;
}

function toHash() {
  const said = new URLSearchParams({
    text: about.texts[state.text],
    step: stepNumber(state.step),
    head: headName(state.layer, state.head),
    query: state.query,
  });
  if (state.key >= 0) said.set("key", state.key);
  if (state.score) said.set("score", state.score);
  if (state.against) said.set("against", state.against);
  for (const flag of ["weigh", "pinned"]) if (state[flag]) said.set(flag, "1");
  if (state.theme) said.set("theme", state.theme);
  return `#${said}`;
}
