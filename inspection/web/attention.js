// The attention that is shown: the patterns of one layer on one text, and those it is compared with. Every drawing
// takes its numbers from here, so that all of them agree.

let view = null;

// The parts of the state that decide which patterns are loaded.
const viewKey = () => [state.text, state.step, state.layer, state.compare].join(" ");

async function loadAttention(run, wantedStep, text, layer) {
  const step = nearestStep(run, wantedStep, text);
  if (step < 0) return null;
  const [tokens, pattern] = await Promise.all([
    loadTokens(run, step, text),
    loadPattern(run, step, text, layer),
  ]);
  return { run, step, layer, pattern, ...tokens };
}

// What to compare with: [run, index of the step], or null.
function comparedWith() {
  if (!state.compare) return null;
  if (state.compare !== "run") return [0, stepIndex(state.compare)];
  const distance = (entry) => Math.abs(entry.step - stepNumber(state.step));
  const nearest = secondRun.steps.reduce((best, entry) => (distance(entry) <= distance(best) ? entry : best));
  return [1, secondRun.steps.indexOf(nearest)];
}

async function loadView() {
  const { text, layer } = state;
  const [key, other] = [viewKey(), comparedWith()];
  const loaded = { key, text, other: null, notice: "", ...(await loadAttention(0, state.step, text, layer)) };
  if (!other) return loaded;
  const { label, layers } = page.runs[other[0]];
  if (layer >= layers) return { ...loaded, notice: `${label} has no layer ${layer} to compare with.` };
  const compared = await loadAttention(...other, text, layer);
  if (!compared) return { ...loaded, notice: "The other run does not have this text." };
  if (compared.tokens.join() !== loaded.tokens.join()) {
    return { ...loaded, notice: "The tokens of this text differ, so attention cannot be compared. Choose another text." };
  }
  return { ...loaded, other: compared };
}

// Whether differences are shown: a comparison is selected and possible for this head.
const comparing = () => Boolean(view.other) && state.head < page.runs[view.other.run].heads;

// How query i attends to keys 0 to i. Value-weighted: A[i, j] |v_j W_O|, normalised to sum 1 (Kobayashi et al. 2020).
function attentionRow({ run, layer, T, pattern, valueNorms }, head, i, valueWeighted) {
  const start = (head * T * (T + 1) + i * (i + 1)) / 2;
  const row = pattern.subarray(start, start + i + 1);
  if (!valueWeighted) return row;
  const norms = valueNorms.subarray((layer * page.runs[run].heads + head) * T);
  const weighted = row.map((weight, j) => weight * norms[j]);
  const total = weighted.reduce((sum, value) => sum + value, 0);
  return total > 0 ? weighted.map((value) => value / total) : weighted;
}

// The row of the selected head as it is shown: attention, or the difference of two.
function shownRow(i) {
  const row = attentionRow(view, state.head, i, state.value_weighted);
  if (!comparing()) return row;
  const other = attentionRow(view.other, state.head, i, state.value_weighted);
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
  return topKeys(attentionRow(view, state.head, state.query, state.value_weighted), 1)[0] ?? 0;
}

// An interesting query to start with: a word that attends strongly to an earlier word that is not its neighbour; among
// those within 5% of the strongest, the one that attends farthest back.
function initialQuery() {
  const isWord = Array.from(view.tokens, (token) => /\p{L}/u.test(spokenToken(token)));
  const pairs = [];
  for (let i = 2; i < view.T; i++) {
    const row = attentionRow(view, state.head, i, false);
    for (let j = view.first ? 0 : 1; j < i - 1; j++) {
      if (row[j] > 0.01 && isWord[i] && isWord[j]) pairs.push({ i, distance: i - j, weight: row[j] });
    }
  }
  const largest = pairs.reduce((most, { weight }) => Math.max(most, weight), 0);
  const strong = pairs.filter(({ weight }) => weight >= 0.95 * largest).sort((a, b) => b.distance - a.distance);
  return strong.length ? strong[0].i : view.T - 1;
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
