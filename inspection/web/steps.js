// "How this number came to be": the chosen weight computed once more, step by step, from the query and the keys that
// the model used, and what the head then hands over. Runs after everything else is drawn, and only while it is seen.

const panelView = { visible: false, name: "", timer: 0 };

// Vector i of a head, out of an array (H, T, D).
const vectorOf = (array, head, i, { width }, T) => array.subarray((head * T + i) * width, (head * T + i + 1) * width);
const dot = (a, b) => a.reduce((sum, value, d) => sum + value * b[d], 0);

// All that leads to the weights of one query, in double precision.
function recompute(details, head, i) {
  const { T } = scene.side;
  const q = vectorOf(details.queries, head, i, details, T);
  const products = Array.from({ length: i + 1 }, (_, j) => dot(q, vectorOf(details.keys, head, j, details, T)));
  const scores = products.map((product) => product / Math.sqrt(details.width));
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return { q, products, scores, largest, powers, total, weights: powers.map((power) => power / total) };
}

// The weighted sum of a head's values for query i.
function handedOver(details, head, i, weights) {
  const out = new Float64Array(details.width);
  weights.forEach((weight, j) => {
    vectorOf(details.values, head, j, details, scene.side.T).forEach((value, d) => (out[d] += weight * value));
  });
  return out;
}

const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

// A vector as bars around a middle line; the number under the pointer is said at its end.
function strip(values, what, { marked = null, masked = values.length, said = null, most = largestOf(values) } = {}) {
  const largest = most || 1;
  const canvas = make("canvas", { class: "strip", role: "img" });
  const length = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
  canvas.setAttribute("aria-label", `${what}: ${values.length} numbers, length ${short(length)}`);
  const out = make("span", { class: "number" }, said || `length ${short(length)}`);
  const paint = () => {
    const [context, width, height] = sharpCanvas(canvas);
    const each = width / values.length;
    context.clearRect(0, 0, width, height);
    if (masked < values.length) {
      context.fillStyle = hatch(context);
      context.fillRect(masked * each, 0, width, height);
    }
    if (marked) {
      context.fillStyle = themeColour("wash");
      context.fillRect(marked[0] * each, 0, (marked[1] - marked[0]) * each, height);
    }
    const [more, less, faint] = ["more", "less", "hatch"].map(themeColour);
    values.forEach((value, d) => {
      const tall = (Math.abs(value) / largest) * (height / 2 - 1);
      context.fillStyle = d >= masked ? faint : value < 0 ? less : more;
      context.fillRect(d * each, value < 0 ? height / 2 : height / 2 - tall, Math.max(each - (each > 3 ? 1 : 0), 0.5), tall);
    });
  };
  canvas.addEventListener("pointermove", (event) => {
    const d = Math.min(values.length - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * values.length)));
    out.textContent = `${d}: ${short(values[d])}`;
  });
  requestAnimationFrame(paint);
  return make("div", { class: "strip-row" }, canvas, out);
}

const numbersOf = (values) =>
  make("details", {}, make("summary", {}, "numbers"), make("p", { class: "numbers" }, Array.from(values, short).join("  ")));

function titled(number, title, ...children) {
  return make("li", {}, make("h3", {}, make("span", { class: "step-number" }, number), title), ...children);
}

function miniBar(value, largest) {
  const bar = make("span", { class: value < 0 ? "mini less" : "mini" });
  bar.style.setProperty("--share", Math.abs(value) / (largest || 1));
  return bar;
}

// Query, key and product of each feature, one card for each.
function featureCards(q, k) {
  const products = q.map((value, d) => value * k[d]);
  const limits = [q, k, products].map(largestOf);
  const cards = Array.from(q, (_, d) => {
    const rows = [q[d], k[d], products[d]].flatMap((value, n) => [
      miniBar(value, limits[n]),
      make("span", { class: "number" }, fixed(value)),
    ]);
    const title = `feature ${d}: ${short(q[d])} × ${short(k[d])} = ${short(products[d])}`;
    return make("div", { class: "feature", title }, ...rows);
  });
  return make("div", { class: "features" }, ...cards);
}

function productWords(q, k, product) {
  const terms = Array.from(q, (value, d) => value * k[d]);
  const order = Array.from(terms.keys()).sort((a, b) => Math.abs(terms[b]) - Math.abs(terms[a])).slice(0, 3);
  const shown = order.map((d) => `${fixed(q[d])} × ${fixed(k[d])}`).join(" + ");
  const rest = terms.length > 3 ? ` + ${terms.length - 3} more` : "";
  const sum = make("strong", { id: "step-product" }, fixed(product, 4));
  return make("p", { class: "formula" }, `q · k = ${shown}${rest} = `, sum);
}

// The scores of all keys side by side; those that the mask removes are hatched.
function maskStrip(details, found, head, key) {
  const { T } = scene.side;
  const score = (j) => dot(found.q, vectorOf(details.keys, head, j, details, T)) / Math.sqrt(details.width);
  const all = Array.from({ length: T }, (_, j) => score(j));
  const said = `score ${short(all[key])}`;
  return strip(all, "scores of all keys, later ones masked", { marked: [key, key + 1], masked: state.query + 1, said });
}

// Every key of the query: score, its exponential, the weight, and the weight that the model used.
function softmaxTable(found, stored, key) {
  const { tokens } = scene.side;
  const names = ["key", "score", "exp(score − largest)", "weight", "stored"];
  const head = names.map((text) => make("th", { scope: "col" }, text));
  const rows = found.scores.map((score, j) => {
    const numbers = [fixed(score, 3), short(found.powers[j]), fixed(found.weights[j], 4), fixed(stored[j], 4)];
    const cells = numbers.map((text) => make("td", {}, text));
    const name = make("td", {}, tokenLabel(tokens[j]));
    return make("tr", { "data-key": j, class: j === key ? "chosen" : null }, name, ...cells);
  });
  const later = scene.side.T - found.scores.length;
  if (later) {
    const cells = [`${later} later`, "−∞", "0", "0", "masked"].map((text) => make("td", {}, text));
    rows.push(make("tr", { class: "masked" }, ...cells));
  }
  const body = make("tbody", {}, ...rows);
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), body);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "softmax, all keys" }, table);
}

// The values that are read most, each times its weight; the others together; and the sum.
function valueSteps(details, found, head) {
  const { tokens, T } = scene.side;
  const order = strongest(Float64Array.from(found.weights), 3);
  const rest = found.weights.map((weight, j) => (order.includes(j) ? 0 : weight));
  const sum = handedOver(details, head, state.query, found.weights);
  const terms = order.map((j) => vectorOf(details.values, head, j, details, T).map((x) => x * found.weights[j]));
  const most = Math.max(...[sum, ...terms].map(largestOf)); // one scale for all, so that small terms look small
  const row = (name, values, what) =>
    make("div", { class: "term" }, make("span", {}, ...name), strip(values, what, { most }));
  const rows = order.map((j, n) =>
    row([`${fixed(found.weights[j], 3)} × v of `, tokenLabel(tokens[j], 12)], terms[n], "weight times value"));
  const others = found.weights.length - order.length;
  if (others > 0) rows.push(row([`${others} others`], handedOver(details, head, state.query, rest), "the other values"));
  rows.push(row([make("strong", {}, "sum")], sum, "what the head hands over"));
  return [...rows, numbersOf(sum)];
}

function headSteps(details) {
  const { heads } = run;
  const { width, stream } = details;
  const all = new Float64Array(heads * width);
  for (let h = 0; h < heads; h++) {
    const { weights } = recompute(details, h, state.query);
    all.set(handedOver(details, h, state.query, weights), h * width);
  }
  const marked = [state.head * width, (state.head + 1) * width];
  const names = make("div", { class: "head-names" }, ...Array.from({ length: heads }, (_, h) => {
    return make("span", { class: h === state.head ? "chosen" : null }, heads <= 16 ? headName(scene.layer, h) : "");
  }));
  const parts = [names, strip(all, "all heads side by side", { marked })];
  if (!stream) return [...parts, make("p", { class: "absent" }, "The projection is not kept in this file.")];
  const projected = details.projected.subarray(state.query * stream, (state.query + 1) * stream);
  const text = `times W_O: ${stream} numbers, which layer ${scene.layer} adds to the residual stream at this token`;
  return [...parts, make("p", {}, text), strip(projected, "what the layer adds"), numbersOf(projected)];
}

// Steps and texts of which queries and keys are kept, the nearest to what is shown first.
function explainedPlaces() {
  const places = [];
  run.steps.forEach((entry, step) => entry.texts.forEach((one, text) => {
    if (one && one.details) places.push({ step, text });
  }));
  const far = ({ step, text }) => (text === state.text ? 0 : 1e6) + Math.abs(step - state.step);
  return places.sort((a, b) => far(a) - far(b));
}

function drawAbsent(panel) {
  const [place] = explainedPlaces();
  if (!place) {
    const text = "Queries, keys and values were not recorded in these files, so the steps cannot be shown.";
    return fill(panel, make("li", { class: "absent" }, text));
  }
  const where = `step ${stepNumber(place.step)}, text “${about.texts[place.text]}”`;
  const button = make("button", { type: "button", id: "go-explained" }, `Go to ${where}`);
  const query = place.text === state.text ? state.query : -1;
  button.addEventListener("click", () => change({ ...place, query, key: -1 }));
  const text = "For this step and text queries and keys are not kept in the page; they are for others. ";
  return fill(panel, make("li", { class: "absent" }, text, button));
}

function agreement(found, stored) {
  const off = stored.reduce((most, weight, j) => Math.max(most, Math.abs(weight - found.weights[j])), 0);
  const key = shownKey();
  const here = Math.abs(stored[key] - found.weights[key]);
  const weights = `recomputed here ${fixed(found.weights[key], 5)}, stored ${fixed(stored[key], 5)}`;
  const differences = `; difference ${short(here)}, the largest over all keys ${short(off)}`;
  const out = make("p", { id: "step-agreement" }, weights, differences);
  Object.assign(out.dataset, { recomputed: found.weights[key], stored: stored[key], largest: off });
  return out;
}

function drawSteps(details) {
  const panel = find("panel");
  if (!details) return drawAbsent(panel);
  const { side } = scene;
  const { query, head } = state;
  const key = shownKey();
  const found = recompute(details, head, query);
  const k = vectorOf(details.keys, head, key, details, side.T);
  const stored = rowOf(scene, head, query, false);
  const named = (position) => tokenLabel(side.tokens[position], 14);
  const formula = (text, value, id = null) => make("p", { class: "formula" }, text, make("strong", { id }, value));
  const product = fixed(found.products[key], 4);
  const divided = `${product} / √${details.width} = ${product} / ${fixed(Math.sqrt(details.width), 3)} = `;
  const powers = `exp(${fixed(found.scores[key], 3)} − ${fixed(found.largest, 3)}) / ${fixed(found.total, 4)} = `;
  const asks = make("p", {}, "q of ", named(query), ", k of ", named(key), ", and their product, feature by feature");
  asks.append(" (normalised and turned by their position where the model does so)");
  return fill(
    panel,
    titled("1", "What the query asks and the key offers", asks, featureCards(wide(found.q), wide(k))),
    titled("2", "Their product, summed", productWords(found.q, k, found.products[key])),
    titled("3", "Divided by the root of the width", formula(divided, fixed(found.scores[key], 4), "step-score")),
    titled("4", "The mask", make("p", {}, maskWords(side.T - query - 1)), maskStrip(details, found, head, key)),
    titled(
      "5",
      "Softmax over all keys",
      formula(powers, fixed(found.weights[key], 4)),
      agreement(found, stored),
      softmaxTable(found, stored, key),
    ),
    titled("6", "The weighted sum of the values", ...valueSteps(details, found, head)),
    titled("7", "All heads, side by side, then projected", ...headSteps(details)),
  );
}

function maskWords(later) {
  if (!later) return "The last token: nothing comes later.";
  const whose = later === 1 ? "1 later token" : `${later} later tokens`;
  return `${whose} may not be read: the score becomes −∞, and exp(−∞) is 0.`;
}

const wide = (values) => Float64Array.from(values);

// Draws the panel soon, unless something newer is asked for before.
function schedulePanel() {
  clearTimeout(panelView.timer);
  if (!panelView.visible) return;
  panelView.timer = setTimeout(async () => {
    const drawn = scene;
    const name = [scene.name, scene.step, state.head, state.query, shownKey()].join(" ");
    if (panelView.name === name) return;
    const details = await loadDetails(0, scene.step, scene.text, scene.layer);
    if (drawn !== scene) return;
    panelView.name = name;
    const [i, j] = [state.query, shownKey()].map((k) => tokenLabel(scene.side.tokens[k]));
    fill(find("panel-head"), `${headName(state.layer, state.head)}, step ${stepNumber(scene.step)}: `, i, " reads ", j);
    drawSteps(details);
  }, 40);
}
