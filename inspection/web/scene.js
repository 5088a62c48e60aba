// The numbers of what is looked at: `scene` holds the weights of one layer on one text, and of what it is compared
// with. All drawings read their numbers here, so that all of them show the same.

let scene = null;

const triangle = (T) => (T * (T + 1)) / 2;

// Which weights the state asks for; token, head and flags change nothing about it.
function sceneName() {
  return [state.text, state.step, state.layer, state.against].join(" ");
}

// One text at one step: `asked` is the step that was wanted, `step` the nearest one that is kept.
async function gatherOne(r, asked, text, layer) {
  const step = nearestStep(r, asked, text);
  if (step < 0) return null;
  const [side, weights] = await Promise.all([loadSide(r, step, text), loadLayer(r, step, text, layer)]);
  return { run: r, asked, step, side, weights };
}

// What to compare with: [run, number of the step], or null.
function opponent() {
  if (!state.against) return null;
  if (state.against !== "other") return [0, run.steps.findIndex((entry) => String(entry.step) === state.against)];
  const mine = stepNumber(state.step);
  let best = 0;
  second.steps.forEach((entry, k) => {
    if (Math.abs(entry.step - mine) <= Math.abs(second.steps[best].step - mine)) best = k;
  });
  return [1, best];
}

async function gather() {
  const name = sceneName();
  const { text, layer } = state;
  const other = opponent();
  const one = await gatherOne(0, state.step, text, layer);
  const found = { name, text, layer, ...one, other: null, refusal: "" };
  if (!other) return found;
  if (layer >= about.runs[other[0]].layers) {
    found.refusal = `${about.runs[other[0]].label} has no layer ${layer}: nothing to compare with.`;
    return found;
  }
  const against = await gatherOne(...other, text, layer);
  const words = (side) => (side ? Array.from(side.tokens).join() : "");
  if (!against) found.refusal = "The other one has no such text: nothing to compare with.";
  else if (words(against.side) !== words(one.side)) {
    found.refusal = "The two have other tokens in this text, so their weights cannot be subtracted. Take another text.";
  } else found.other = against;
  return found;
}

// Whether differences are shown: a comparison was asked for and is possible for this head.
function differs() {
  return Boolean(scene.other) && state.head < about.runs[scene.other.run].heads;
}

// What query i of a head reads: weights of keys 0 to i. With `weigh`, times the values' lengths, and 1 in all again.
function rowOf(source, head, i, weigh) {
  const { T, norms } = source.side;
  const start = head * triangle(T) + (i * (i + 1)) / 2;
  const row = source.weights.subarray(start, start + i + 1);
  if (!weigh) return row;
  const heads = about.runs[source.run].heads;
  const lengths = norms.subarray((scene.layer * heads + head) * T);
  const weighted = row.map((weight, j) => weight * lengths[j]);
  const total = weighted.reduce((sum, value) => sum + value, 0);
  return total > 0 ? weighted.map((value) => value / total) : weighted;
}

// The row as it is shown: weights, or the difference of two.
function shownRow(i, head = state.head) {
  const mine = rowOf(scene, head, i, state.weigh);
  if (!differs()) return mine;
  const theirs = rowOf(scene.other, head, i, state.weigh);
  return mine.map((value, j) => value - theirs[j]);
}

// Keys of a row, those with the largest numbers first (the largest differences, whatever their sign).
function strongest(row, count) {
  const order = Array.from(row.keys()).filter((j) => row[j] !== 0);
  return order.sort((a, b) => Math.abs(row[b]) - Math.abs(row[a]) || b - a).slice(0, count);
}

// The key that is looked at: the one that was chosen, else the one that is read most.
function shownKey() {
  if (state.key >= 0 && state.key <= state.query) return state.key;
  return strongest(rowOf(scene, state.head, state.query, state.weigh), 1)[0] ?? 0;
}

// A token worth looking at first: a word that reads an earlier word, not its neighbour; of those that do so most, the
// one that reads farthest back.
function tellingQuery() {
  const { T, first, tokens } = scene.side;
  const isWord = Array.from(tokens, (token) => /\p{L}/u.test(spoken(token)));
  const found = [];
  for (let i = 2; i < T; i++) {
    const row = rowOf(scene, state.head, i, false);
    for (let j = first ? 0 : 1; j < i - 1; j++) {
      if (row[j] > 0.01 && isWord[i] && isWord[j]) found.push({ i, far: i - j, weight: row[j] });
    }
  }
  const most = found.reduce((largest, { weight }) => Math.max(largest, weight), 0);
  const strong = found.filter(({ weight }) => weight >= 0.95 * most).sort((a, b) => b.far - a.far);
  return strong.length ? strong[0].i : T - 1;
}

// A number of the matrix in words: a share in percent, a difference in points of a percent with its sign.
function inWords(value, digits = 1) {
  if (Number.isNaN(value)) return "not a number";
  const text = (100 * Math.abs(value)).toFixed(digits);
  if (!differs()) return `${text}\u00a0%`;
  const sign = Number(text) === 0 ? "±" : value < 0 ? "−" : "+";
  return `${sign}${text} points`;
}

const numberColour = (value) => (differs() ? differenceColour(value) : shareColour(value));

// What the chosen query reads, as a sentence.
function sentenceOf(count = 3) {
  const { tokens } = scene.side;
  const row = shownRow(state.query);
  const readings = strongest(row, count).map((j) => `${spoken(tokens[j])} ${inWords(row[j])}`);
  const who = spoken(tokens[state.query]);
  if (differs()) return `${who} reads, more or less than there: ${readings.join(", ") || "all the same"}.`;
  return `${who} reads ${readings.join(", ") || "nothing"}.`;
}
