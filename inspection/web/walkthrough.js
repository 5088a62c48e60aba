// The walk-through: the selected attention weight computed again, step by step, from the query and keys that the model
// used, and what the head adds to the residual stream. Drawn last, and only while it is visible.

const walkthrough = { visible: false, drawn: "", timer: 0 };

const dot = (a, b) => a.reduce((sum, value, d) => sum + value * b[d], 0);
const norm = (values) => Math.sqrt(dot(values, values));
const largestOf = (values) => values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);

// The vector at a position of a head, from an array (H, T, D), in double precision.
function vectorAt(array, head, position, D) {
  const start = (head * view.T + position) * D;
  return Float64Array.from(array.subarray(start, start + D));
}

// softmax(q · k / √D) of one query over keys 0 to i, and the values weighted by it.
function computeAttention({ queries, keys, values, D }, head, i) {
  const q = vectorAt(queries, head, i, D);
  const allScores = range(view.T).map((j) => dot(q, vectorAt(keys, head, j, D)) / Math.sqrt(D));
  const scores = allScores.slice(0, i + 1);
  const max = Math.max(...scores);
  const exps = scores.map((score) => Math.exp(score - max));
  const total = exps.reduce((sum, value) => sum + value, 0);
  const pattern = exps.map((value) => value / total);
  const weighted = pattern.map((weight, j) => vectorAt(values, head, j, D).map((value) => value * weight));
  return { q, allScores, scores, max, exps, total, pattern, weighted };
}

const sumVectors = (vectors, D) =>
  vectors.reduce((sum, vector) => sum.map((value, d) => value + vector[d]), new Float64Array(D));

// A vector as bars around zero. Options: scale (value of a full bar), marked [from, to], masked (first masked index),
// note (text next to it). The value under the pointer replaces the note.
function vectorBars(values, name, options = {}) {
  const n = values.length;
  const { scale = largestOf(values), marked = null, masked = n, note = `norm ${compact(norm(values))}` } = options;
  const width = n > 200 ? 1 : 0.85;
  const bars = (select) => Array.from(values, (value, d) => {
    const height = (value / (scale || 1)).toFixed(4);
    return select(value, d) ? `M${d} 0v${-height}h${width}v${height}z` : "";
  }).join("");
  const band = ([from, to], type) => createSvg("rect", { x: from, y: -1, width: to - from, height: 2, class: type });
  const svg = createSvg("svg", {
    class: "bars", viewBox: `0 -1 ${n} 2`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${name}: ${n} numbers, norm ${compact(norm(values))}`,
  });
  if (marked) svg.append(band(marked, "marked"));
  svg.append(
    createSvg("path", { d: bars((value, d) => d < masked && value >= 0), class: "more" }),
    createSvg("path", { d: bars((value, d) => d < masked && value < 0), class: "less" }),
    createSvg("path", { d: bars((_, d) => d >= masked), class: "masked" }),
  );
  const out = create("span", { class: "number" }, note);
  svg.addEventListener("pointermove", (event) => {
    const d = clamp(Math.floor((event.offsetX / svg.clientWidth) * n), 0, n - 1);
    out.textContent = `${d}: ${compact(values[d])}`;
  });
  return create("div", { class: "bars-row" }, svg, out);
}

function numberList(values) {
  const numbers = create("p", { class: "numbers" }, Array.from(values, compact).join("  "));
  return create("details", {}, create("summary", {}, "numbers"), numbers);
}

const section = (number, title, ...children) =>
  create("li", {}, create("h3", {}, create("span", { class: "step-number" }, number), title), ...children);

const formula = (text, result, id = null) => create("p", { class: "formula" }, text, create("strong", { id }, result));

// A card per dimension: query, key and their product.
function dimensionCards(q, k) {
  const products = q.map((value, d) => value * k[d]);
  const cards = range(q.length).map((d) => {
    const rows = [q, k, products].flatMap((values) => {
      const bar = create("span", { class: values[d] < 0 ? "mini less" : "mini" });
      bar.style.setProperty("--share", Math.abs(values[d]) / (largestOf(values) || 1));
      return [bar, create("span", { class: "number" }, fixed(values[d]))];
    });
    const title = `dimension ${d}: ${compact(q[d])} × ${compact(k[d])} = ${compact(products[d])}`;
    return create("div", { class: "dimension", title }, ...rows);
  });
  return create("div", { class: "dimensions" }, ...cards);
}

function dotProduct(q, k) {
  const terms = q.map((value, d) => value * k[d]);
  const largest = topKeys(terms, 3).map((d) => `${fixed(q[d])} × ${fixed(k[d])}`).join(" + ");
  const rest = terms.length > 3 ? ` + ${terms.length - 3} more` : "";
  return formula(`q · k = ${largest}${rest} = `, fixed(dot(q, k), 4), "step-product");
}

// Every key of the query: score, exponential, weight, and the weight that the model stored.
function softmaxTable({ scores, exps, pattern }, stored, key) {
  const row = (tag, cells, attributes = {}) => create("tr", attributes, ...cells.map((cell) => create(tag, {}, cell)));
  const rows = scores.map((score, j) => row("td", [
    tokenLabel(view.tokens[j]), fixed(score, 3), compact(exps[j]), fixed(pattern[j], 4), fixed(stored[j], 4),
  ], { "data-key": j, class: j === key ? "selected" : null }));
  const masked = view.T - scores.length;
  if (masked) rows.push(row("td", [`${masked} later`, "−∞", "0", "0", "masked"], { class: "masked" }));
  const header = row("th", ["key", "score", "exp(score − max)", "weight", "stored"]);
  const table = create("table", {}, create("thead", {}, header), create("tbody", {}, ...rows));
  return create("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "softmax" }, table);
}

function agreement(pattern, stored, key) {
  const largest = stored.reduce((most, weight, j) => Math.max(most, Math.abs(weight - pattern[j])), 0);
  const difference = compact(Math.abs(stored[key] - pattern[key]));
  const out = create("p", { id: "step-agreement" },
    `recomputed ${fixed(pattern[key], 5)}, stored ${fixed(stored[key], 5)}; `,
    `difference ${difference}, at most ${compact(largest)} over all keys`);
  Object.assign(out.dataset, { recomputed: pattern[key], stored: stored[key], largest });
  return out;
}

// The three largest weighted values, the sum of the others, and the sum of all, on one scale.
function weightedValues({ pattern, weighted }, D) {
  const top = topKeys(Float64Array.from(pattern), 3);
  const others = weighted.filter((_, j) => !top.includes(j));
  const sum = sumVectors(weighted, D);
  const scale = Math.max(...[sum, ...top.map((j) => weighted[j])].map(largestOf));
  const row = (label, values, name) =>
    create("div", { class: "term" }, create("span", {}, ...label), vectorBars(values, name, { scale }));
  const rows = top.map((j) =>
    row([`${fixed(pattern[j], 3)} × v of `, tokenLabel(view.tokens[j], 12)], weighted[j], "weighted value"));
  if (others.length) rows.push(row([`${others.length} others`], sumVectors(others, D), "the other weighted values"));
  return [...rows, row([create("strong", {}, "sum")], sum, "head output"), numberList(sum)];
}

function outputProjection(qkv) {
  const { D, C, output } = qkv;
  const heads = range(run.heads).map((h) => sumVectors(computeAttention(qkv, h, state.query).weighted, D));
  const marked = [state.head * D, (state.head + 1) * D];
  const names = range(run.heads).map((h) =>
    create("span", { class: h === state.head ? "selected" : null }, run.heads <= 16 ? headName(view.layer, h) : ""));
  const concatenated = heads.flatMap((vector) => Array.from(vector));
  const parts = [
    create("div", { class: "head-names" }, ...names),
    vectorBars(concatenated, "outputs of all heads", { marked }),
  ];
  if (!C) return [...parts, create("p", { class: "absent" }, "The projected output is not stored in this file.")];
  const projected = Float64Array.from(output.subarray(state.query * C, (state.query + 1) * C));
  const text = `times W_O: ${C} numbers that layer ${view.layer} adds to the residual stream at this position`;
  return [...parts, create("p", {}, text), vectorBars(projected, "attention output"), numberList(projected)];
}

// The stored queries and keys nearest to the selected text and step: {step, text}, or undefined.
function nearestQkv() {
  const places = run.steps.flatMap(({ texts }, step) =>
    texts.map((stored, text) => ({ step, text, stored })).filter(({ stored }) => stored?.qkv));
  const distance = ({ step, text }) => (text === state.text ? 0 : 1e6) + Math.abs(step - state.step);
  return places.sort((a, b) => distance(a) - distance(b))[0];
}

function drawMissing() {
  const place = nearestQkv();
  if (!place) {
    const text = "Queries, keys and values are not stored in these files, so the steps cannot be shown.";
    byId("walkthrough").replaceChildren(create("li", { class: "absent" }, text));
    return;
  }
  const { step, text } = place;
  const where = `step ${stepNumber(step)}, text “${page.texts[text]}”`;
  const button = create("button", { type: "button", id: "go-to-stored" }, `Go to ${where}`);
  const query = text === state.text ? state.query : -1;
  button.addEventListener("click", () => change({ step, text, query, key: -1 }));
  const reason = "Queries and keys are not stored for this text and step. ";
  byId("walkthrough").replaceChildren(create("li", { class: "absent" }, reason, button));
}

function drawSteps(qkv) {
  const { query, head } = state;
  const { D } = qkv;
  const key = selectedKey();
  const computed = computeAttention(qkv, head, query);
  const { q, allScores, scores, max, exps, total, pattern } = computed;
  const k = vectorAt(qkv.keys, head, key, D);
  const stored = attentionRow(view, head, query, false);
  const [queryToken, keyToken] = [query, key].map((position) => tokenLabel(view.tokens[position], 14));
  const product = fixed(dot(q, k), 4);
  const masked = view.T - query - 1;
  const maskText = masked
    ? `${masked} later ${masked === 1 ? "key is" : "keys are"} masked: the score becomes −∞, and exp(−∞) is 0.`
    : "This is the last token: no key is later, so nothing is masked.";
  const bars = { marked: [key, key + 1], masked: query + 1, note: `score ${compact(allScores[key])}` };
  byId("walkthrough").replaceChildren(
    section("1", "Query and key", create("p", {}, "q of ", queryToken, ", k of ", keyToken, ", and their product ",
      "in each dimension (after normalisation and RoPE where the model has them)"), dimensionCards(q, k)),
    section("2", "Dot product", dotProduct(q, k)),
    section("3", "Scaled by √d_head", formula(
      `${product} / √${D} = ${product} / ${fixed(Math.sqrt(D), 3)} = `, fixed(scores[key], 4), "step-score")),
    section("4", "Causal mask", create("p", {}, maskText), vectorBars(allScores, "scores of all keys", bars)),
    section("5", "Softmax over all keys",
      formula(`exp(${fixed(scores[key], 3)} − ${fixed(max, 3)}) / ${fixed(total, 4)} = `, fixed(pattern[key], 4)),
      agreement(pattern, stored, key), softmaxTable(computed, stored, key)),
    section("6", "Weighted sum of the values", ...weightedValues(computed, D)),
    section("7", "All heads concatenated, then projected", ...outputProjection(qkv)),
  );
}

// Draws soon, unless the selection changes before.
function scheduleWalkthrough() {
  clearTimeout(walkthrough.timer);
  if (!walkthrough.visible) return;
  walkthrough.timer = setTimeout(async () => {
    const current = view;
    const drawn = [view.key, view.step, state.head, state.query, selectedKey()].join(" ");
    if (walkthrough.drawn === drawn) return;
    const qkv = await loadQkv(view.step, view.text, view.layer);
    if (current !== view) return;
    walkthrough.drawn = drawn;
    const [query, key] = [state.query, selectedKey()].map((position) => tokenLabel(view.tokens[position]));
    const head = `${headName(state.layer, state.head)}, step ${stepNumber(view.step)}: `;
    byId("walkthrough-head").replaceChildren(head, query, " attends to ", key);
    if (qkv) drawSteps(qkv);
    else drawMissing();
  }, 40);
}
