// The walk-through: the selected attention weight computed again, step by step, from the query and keys that the model
// used, and what the head adds to the residual stream. Drawn last, and only while it is visible.

const NOT_STORED = "Queries and keys are not stored for this text and step. A page has them for the sample of the last step, " +
  "if there is one, and for your own text, if the page runs the model.";
let walkthroughVisible = false;

const labelAt = (position) => tokenLabel(view.tokens[position]);
const dot = (a, b) => sum(a.map((value, d) => value * b[d]));
const largestOf = (values) => values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
const sumVectors = (vectors, D) => Float64Array.from(range(D), (d) => sum(vectors.map((vector) => vector[d])));

// The vectors (T, D) of one head, from an array (H, T, D), in double precision.
function vectorsOf(array, head) {
  const D = array.length / (run.heads * view.T);
  return range(view.T).map((t) => Float64Array.from(rowAt(array, D, head * view.T + t)));
}

// softmax(q · k / √D) of the selected query over keys 0 to i, and the values weighted by it.
function computeAttention(head) {
  const [queries, keys, values] = [view.queries, view.keys, view.values].map((array) => vectorsOf(array, head));
  const q = queries[state.query];
  const allScores = keys.map((k) => dot(q, k) / Math.sqrt(q.length));
  const scores = allScores.slice(0, state.query + 1);
  const max = Math.max(...scores);
  const exps = scores.map((score) => Math.exp(score - max));
  const total = sum(exps);
  const pattern = exps.map((value) => value / total);
  const weighted = pattern.map((weight, j) => values[j].map((value) => value * weight));
  return { q, keys, allScores, scores, max, exps, total, pattern, weighted, output: sumVectors(weighted, q.length) };
}

// A vector as bars around zero. Options: scale (value of a full bar), marked [from, to], masked (first masked index),
// note (text next to it). The value under the pointer replaces the note.
function vectorBars(values, name, options = {}) {
  const n = values.length;
  const norm = `norm ${compact(Math.sqrt(dot(values, values)))}`;
  const { scale = largestOf(values), marked: [from, to] = [0, 0], masked = n, note = norm } = options;
  const width = n > 200 ? 1 : 0.85;
  const kind = (value, d) => (d >= masked ? "masked" : value < 0 ? "less" : "more");
  const bar = (value, d) => `M${d} 0v${(-value / (scale || 1)).toFixed(4)}h${width}V0z`;
  const bars = (type) => Array.from(values, (value, d) => (kind(value, d) === type ? bar(value, d) : "")).join("");
  const svg = createSvg("svg", {
    class: "bars", viewBox: `0 -1 ${n} 2`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${name}: ${n} numbers, ${norm}`,
  },
  createSvg("rect", { x: from, y: -1, width: to - from, height: 2, class: "marked" }),
  ...["more", "less", "masked"].map((type) => createSvg("path", { d: bars(type), class: type })));
  const out = create("span", { class: "number" }, note);
  svg.addEventListener("pointermove", (event) => {
    const d = clamp(Math.floor((event.offsetX / svg.clientWidth) * n), 0, n - 1);
    out.textContent = `${d}: ${compact(values[d])}`;
  });
  return create("div", { class: "bars-row" }, svg, out);
}

const formula = (text, result, id = null) => create("p", { class: "formula" }, text, create("strong", { id }, result));

// A card per dimension: query, key and their product.
function dimensionCards(q, k, products) {
  const cards = range(q.length).map((d) => {
    const rows = [q, k, products].flatMap((values) => [
      shareBar(values[d] / (largestOf(values) || 1), values[d] < 0 ? "var(--less)" : "var(--accent)"),
      create("span", { class: "number" }, fixed(values[d])),
    ]);
    const title = `dimension ${d}: ${compact(q[d])} × ${compact(k[d])} = ${compact(products[d])}`;
    return create("div", { class: "dimension", title }, ...rows);
  });
  return create("div", { class: "dimensions" }, ...cards);
}

// Every key of the query: score, exponential, weight, and the weight that the model stored.
function softmaxTable({ scores, exps, pattern }, stored, key) {
  const row = (tag, cells, attributes = {}) => create("tr", attributes, ...cells.map((cell) => create(tag, {}, cell)));
  const rows = scores.map((score, j) => row("td", [
    tokenLabel(view.tokens[j]), fixed(score, 3), compact(exps[j]), fixed(pattern[j], 4), fixed(stored[j], 4),
  ], { "data-key": j, "data-change": JSON.stringify({ key: j }), class: j === key ? "selected" : null }));
  const masked = view.T - scores.length;
  if (masked) rows.push(row("td", [`${masked} later`, "−∞", "0", "0", "masked"], { class: "masked" }));
  const header = row("th", ["key", "score", "exp(score − max)", "weight", "stored"]);
  const table = create("table", {}, create("thead", {}, header), create("tbody", {}, ...rows));
  return create("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "softmax" }, table);
}

// The three largest weighted values, the sum of the others, and the sum of all, on one scale.
function weightedValues({ pattern, weighted, output }) {
  const top = topKeys(pattern, 3);
  const others = weighted.filter((_, j) => !top.includes(j));
  const scale = Math.max(...[output, ...top.map((j) => weighted[j])].map(largestOf));
  const row = (label, values, name) =>
    create("div", { class: "term" }, create("span", {}, ...label), vectorBars(values, name, { scale }));
  const rows = top.map((j) =>
    row([`${fixed(pattern[j], 3)} × v of `, tokenLabel(view.tokens[j], 12)], weighted[j], "weighted value"));
  const rest = sumVectors(others, output.length);
  if (others.length) rows.push(row([`${others.length} others`], rest, "the other weighted values"));
  return [...rows, row([create("strong", {}, "sum")], output, "head output")];
}

function outputProjection(D) {
  const concatenated = range(run.heads).flatMap((head) => Array.from(computeAttention(head).output));
  const parts = [
    create("p", {}, `the outputs of heads 0 to ${run.heads - 1}; that of ${headName(view.layer, state.head)} is marked`),
    vectorBars(concatenated, "outputs of all heads", { marked: [state.head * D, (state.head + 1) * D] }),
  ];
  if (!view.attn_out) return parts;
  const C = view.attn_out.length / view.T;
  const text = `times W_O: ${C} numbers that layer ${view.layer} adds to the residual stream at this position`;
  return [...parts, create("p", {}, text), vectorBars(rowAt(view.attn_out, C, state.query), "attention output")];
}

function computedSteps(key) {
  const computed = computeAttention(state.head);
  const { q, allScores, scores, max, total, pattern } = computed;
  const k = computed.keys[key];
  const products = q.map((value, d) => value * k[d]);
  const product = fixed(sum(products), 4);
  const scaled = `${product} / √${q.length} = ${product} / ${fixed(Math.sqrt(q.length), 3)} = `;
  const mask = `Later keys (here ${view.T - scores.length}) are masked: the score becomes −∞, and exp(−∞) is 0.`;
  const bars = { marked: [key, key + 1], masked: state.query + 1, note: `score ${compact(allScores[key])}` };
  const steps = {
    "Query and key": [create("p", {}, "q of ", labelAt(state.query), ", k of ", labelAt(key), ", and their product in each ",
      "dimension (after normalisation and RoPE where the model has them)"), dimensionCards(q, k, products)],
    "Dot product": [formula("q · k = the sum of the products = ", product, "step-product")],
    "Scaled by √d_head": [formula(scaled, fixed(scores[key], 4), "step-score")],
    "Causal mask": [create("p", {}, mask), vectorBars(allScores, "scores of all keys", bars)],
    "Softmax over all keys": [
      formula(`exp(${fixed(scores[key], 3)} − ${fixed(max, 3)}) / ${fixed(total, 4)} = `, fixed(pattern[key], 4)),
      softmaxTable(computed, storedRow(state.query), key)],
    "Weighted sum of the values": weightedValues(computed),
    "All heads concatenated, then projected": outputProjection(q.length),
  };
  return Object.entries(steps).map(([title, content], n) =>
    create("li", {}, create("h3", {}, create("span", { class: "step-number" }, n + 1), title), ...content));
}

function drawWalkthrough() {
  if (!walkthroughVisible) return;
  const key = selectedKey();
  const head = `${headName(state.layer, state.head)}, step ${stepNumber(view.step)}: `;
  byId("walkthrough-head").replaceChildren(head, labelAt(state.query), " attends to ", labelAt(key));
  const steps = view.queries ? computedSteps(key) : [create("li", { class: "absent" }, NOT_STORED)];
  byId("walkthrough").replaceChildren(...steps);
}
