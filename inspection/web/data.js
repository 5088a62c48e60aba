// The numbers of the page, as inspection/page_builder.py wrote them. Arrays are decompressed when they are needed.

const page = JSON.parse(byId("page-data").textContent);
const run = page.runs[0];
const secondRun = page.runs[1] || null;

const DECODERS = {
  int8: (buffer) => new Int8Array(buffer),
  float32: (buffer) => new Float32Array(buffer),
  uint32: (buffer) => new Uint32Array(buffer),
  float16: (buffer) => Float32Array.from(new Float16Array(buffer)),
};

async function decode([dtype, base64]) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return DECODERS[dtype](await new Response(stream).arrayBuffer());
}

// The same of a table of arrays by name.
async function decodeAll(arrays) {
  const entries = Object.entries(arrays).map(async ([name, array]) => [name, await decode(array)]);
  return Object.fromEntries(await Promise.all(entries));
}

// What the page holds of a text at a step, or null.
const storedText = (run, step, text) => page.runs[run].steps[step].texts[text];

// The index of the stored step nearest to the given one at which the run has this text, or for the own text the weights; -1 if
// it never has.
function nearestStep(run, step, text) {
  const { steps } = page.runs[run];
  const hasWeights = (k) => run === 0 && backend.steps.includes(steps[k].step);
  const stored = range(steps.length).filter((k) => (text === OWN ? hasWeights(k) : storedText(run, k, text)));
  return nearest(stored, (k) => Math.abs(k - step)) ?? -1;
}

// A text at the nearest step that has it, with the arrays of one layer; `_text` in page_builder.py has their shapes.
async function loadText(run, wantedStep, text, layer) {
  const step = nearestStep(run, wantedStep, text);
  if (step < 0) return null;
  if (text === OWN) return loadOwn(step, layer);
  const { length: T, first, arrays, layers } = storedText(run, step, text);
  const decoded = await decodeAll({ ...arrays, ...layers[layer] });
  const value_norms = rowAt(decoded.value_norms, decoded.value_norms.length / page.runs[run].layers, layer);
  return { run, step, text, layer, T, first, ...decoded, value_norms };
}

// A token in one line: a space as a dot, a line break as an arrow, undecodable bytes as \xNN.
function tokenText(token, length = Infinity) {
  const letters = Array.from(page.vocabulary[token].map((piece) => piece.slice(1)).join(""));
  return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : letters.join("");
}

// The same for a screen reader: without the dot for a space.
const spokenToken = (token) => tokenText(token).replaceAll("·", " ").trim() || tokenText(token);
