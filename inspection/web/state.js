// What is selected: one object, mirrored in the address's hash so that a view can be shared as a link.

const state = {
  text: 0, // index of the text
  step: 0, // index of the step
  layer: 0,
  head: 0,
  query: -1, // position of the query token; -1: choose one
  key: -1, // position of the key token; -1: the one that the query attends to most
  score: "",
  value_weighted: false,
  compare: "", // "": nothing; "400": step 400 of this run; "run": the second run
  pinned: false,
  theme: "", // "": as the system has it
};

const stepNumber = (k) => run.steps[k].step;
const stepIndex = (number) => run.steps.findIndex(({ step }) => String(step) === number);

// The first view: the last step, and the head of the headline.
function initialState() {
  const step = run.steps.length - 1;
  const text = run.steps[step].texts.findIndex((stored) => stored);
  return { ...page.start, step, text, query: -1, key: -1, value_weighted: false, compare: "", pinned: false };
}

const integerBelow = (text, limit) => (/^\d{1,9}$/.test(text || "") && Number(text) < limit ? Number(text) : -1);

// The state that a hash describes; invalid parts are ignored.
function stateFromHash(hash) {
  const params = new URLSearchParams(hash.replace(/^#/, ""));
  const changes = initialState();
  const set = (name, value, valid) => valid && (changes[name] = value);
  const text = page.texts.indexOf(params.get("text"));
  set("text", text, text >= 0 && nearestStep(0, 0, text) >= 0);
  set("step", stepIndex(params.get("step")), stepIndex(params.get("step")) >= 0);
  const [, layer, head] = /^L(\d+)H(\d+)$/.exec(params.get("head") || "") || [];
  if (integerBelow(layer, run.layers) >= 0 && integerBelow(head, run.heads) >= 0) {
    Object.assign(changes, { layer: Number(layer), head: Number(head) });
  }
  const { tokens: T } = storedText(0, nearestStep(0, changes.step, changes.text), changes.text);
  changes.query = integerBelow(params.get("query"), T);
  changes.key = integerBelow(params.get("key"), changes.query + 1);
  set("score", params.get("score"), Object.hasOwn(page.scores, params.get("score") || ""));
  const compare = params.get("compare") || "";
  set("compare", compare, compare === "run" ? secondRun : stepIndex(compare) >= 0);
  for (const flag of ["value_weighted", "pinned"]) changes[flag] = params.get(flag) === "1";
  set("theme", params.get("theme"), ["light", "dark"].includes(params.get("theme")));
  return changes;
}

function stateToHash() {
  const params = new URLSearchParams({
    text: page.texts[state.text],
    step: stepNumber(state.step),
    head: headName(state.layer, state.head),
    query: state.query,
  });
  if (state.key >= 0) params.set("key", state.key);
  for (const name of ["score", "compare", "theme"]) if (state[name]) params.set(name, state[name]);
  for (const flag of ["value_weighted", "pinned"]) if (state[flag]) params.set(flag, "1");
  return `#${params}`;
}
