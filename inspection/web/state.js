// What is selected: one object, mirrored in the address's hash so that a view can be shared as a link.

const state = {};

const stepNumber = (k) => run.steps[k].step;
const stepIndex = (number) => run.steps.findIndex(({ step }) => String(step) === number);
const allHeads = range(run.layers).flatMap((layer) => range(run.heads).map((head) => ({ layer, head })));
const integerBelow = (text, limit) => (/^\d{1,9}$/.test(text) && Number(text) < limit ? Number(text) : -1);

// The state that a hash describes. What is absent or invalid is as in the first view: last step, head of the headline.
function stateFromHash(hash) {
  const params = new URLSearchParams(hash.slice(1));
  const choose = (name, valid, otherwise) => (valid.includes(params.get(name)) ? params.get(name) : otherwise);
  const steps = run.steps.map(({ step }) => String(step));
  const step = stepIndex(choose("step", steps, steps.at(-1)));
  const texts = page.texts.filter((_, k) => nearestStep(0, 0, k) >= 0);
  const text = page.texts.indexOf(choose("text", texts, page.texts[run.steps.at(-1).texts.findIndex(Boolean)]));
  const T = text === OWN ? page.model.config.context : storedText(0, nearestStep(0, step, text), text).length;
  const isName = (name) => page.model && /^L\d{1,3}(H\d{1,3}| MLP)$/.test(name);
  const query = integerBelow(params.get("query"), T); // -1: choose one
  return {
    text,
    step, // its index
    ...(allHeads.find(({ layer, head }) => headName(layer, head) === params.get("head")) || page.start),
    query,
    key: integerBelow(params.get("key"), query + 1), // -1: the one that the query attends to most
    score: choose("score", Object.keys(page.scores), page.start.score),
    value_weighted: params.get("value_weighted") === "1",
    compare: choose("compare", secondRun ? ["run", ...steps] : steps, ""), // a step, the second run, or ""
    pinned: params.get("pinned") === "1",
    own: (params.get("own") ?? page.own).slice(0, 4000), // the own text
    off: (params.get("off") ?? "").split(",").filter(isName).join(","), // heads and MLPs that are switched off in it
    mode: choose("mode", ["zero", "mean"], "zero"),
  };
}

function stateToHash() {
  const { layer, head, text, step, query, key, own, off, mode, ...others } = state;
  const named = { text: page.texts[text], step: stepNumber(step), head: headName(layer, head), query };
  if (key >= 0) named.key = key;
  if (text === OWN) Object.assign(named, { own }, off && { off, mode });
  const set = Object.entries(others).filter(([, value]) => value); // neither "" nor false
  return `#${new URLSearchParams([...Object.entries(named), ...set])}`.replaceAll("=true", "=1");
}
