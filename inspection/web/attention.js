// The attention that is shown: the patterns of one layer on one text, and those it is compared with. Every drawing
// takes its numbers from here, so that all of them agree. The five steps that compute attention are in engine.js.

let view = null; // as loadText returns it, with `other`: the same to compare with, or null

// What to compare with: the indices [run, step], or null.
function comparedWith() {
  if (!state.compare) return null;
  if (state.compare !== "run") return [0, stepIndex(state.compare)];
  const distance = (k) => Math.abs(secondRun.steps[k].step - stepNumber(state.step));
  return [1, nearest(range(secondRun.steps.length), distance)];
}

// The parts of the state that decide which patterns are loaded.
function viewKey() {
  const own = state.text === OWN ? [state.query, state.off, state.mode, state.value_weighted, state.own] : [];
  return [state.text, state.step, state.layer, state.compare, ...own].join(" ");
}

async function loadView(text = state.text) {
  const { layer, step } = state;
  const compared = comparedWith();
  const loaded = await loadText(0, step, text, layer);
  const other = compared && await loadText(...compared, text, layer);
  const comparable = other?.pattern && String(other.tokens) === String(loaded.tokens);
  return { ...loaded, other: comparable ? other : null };
}

// The view of the first text that both sides of a comparison have; undefined if there is none.
async function loadComparable() {
  for (const text of page.texts.keys()) {
    const loaded = nearestStep(0, state.step, text) >= 0 && await loadView(text);
    if (loaded?.other) return loaded;
  }
}

// Whether differences are shown: a comparison is selected and possible for this head.
const comparing = () => Boolean(view.other) && state.head < page.runs[view.other.run].heads;

// How query i attends to keys 0 to i. Value-weighted: A[i, j] |v_j W_O|, normalised to sum 1 (Kobayashi et al. 2020).
function attentionRow({ T, pattern, value_norms: norms }, i, { head, value_weighted: weighted } = state) {
  const start = (head * T * (T + 1) + i * (i + 1)) / 2;
  const row = pattern.subarray(start, start + i + 1);
  if (!weighted) return row;
  const products = row.map((weight, j) => weight * norms[head * T + j]);
  const total = sum(products);
  return total > 0 ? products.map((value) => value / total) : products;
}

// The pattern as the model computed it, whether or not it is shown value-weighted.
const storedRow = (i) => attentionRow(view, i, { head: state.head });

// The row of the selected head as it is shown: attention, or the difference of two.
function shownRow(i) {
  const row = attentionRow(view, i);
  if (!comparing()) return row;
  const other = attentionRow(view.other, i);
  return row.map((value, j) => value - other[j]);
}

// The keys with the largest values of a row (in absolute value), largest first.
function topKeys(row, count) {
  const keys = Array.from(row.keys()).filter((j) => row[j] !== 0);
  return keys.sort((a, b) => Math.abs(row[b]) - Math.abs(row[a]) || b - a).slice(0, count);
}

// The selected key, by default the one that the query attends to most.
function selectedKey() {
  if (state.key >= 0 && state.key <= state.query) return state.key;
  return topKeys(attentionRow(view, state.query), 1)[0] ?? 0;
}

// An interesting query to start with: the word that attends most to an earlier word that is not its neighbour.
function initialQuery() {
  const isWord = Array.from(view.tokens, (token) => /\p{L}/u.test(spokenToken(token)));
  const isDistant = (i, j) => isWord[i] && isWord[j] && j < i - 1 && view.first + j > 0;
  const largest = range(view.T).map((i) => Math.max(0, ...storedRow(i).filter((_, j) => isDistant(i, j))));
  return nearest(range(view.T), (i) => -largest[i]);
}

// Attention in percent; a difference in signed percentage points.
function percent(value, digits = 1) {
  if (Number.isNaN(value)) return "not a number";
  const text = (100 * Math.abs(value)).toFixed(digits);
  if (!comparing()) return `${text}\u00a0%`;
  return `${Number(text) === 0 ? "±" : value < 0 ? "−" : "+"}${text} points`;
}

const valueColour = (value) => (comparing() ? divergingColour(value) : sequentialColour(value));

// The selected query's attention as a sentence, for screen readers.
function spokenSummary() {
  const row = shownRow(state.query);
  const keys = topKeys(row, 3).map((j) => `${spokenToken(view.tokens[j])} ${percent(row[j])}`).join(", ");
  const query = spokenToken(view.tokens[state.query]);
  if (comparing()) return `${query}, difference in attention: ${keys || "none"}.`;
  return `${query} attends to ${keys || "nothing"}.`;
}
