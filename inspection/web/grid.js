// All heads: a score of each, and the effect of ablating it. Effects, intervals and labels come from Python.

const grid = { drawn: "", cells: [] };

const effectLabel = (score, layer, head) => page.scores[score].labels?.[layer][head] || null;
const ablationOf = (score) => page.ablation[page.scores[score].measure] || null;
const scoreAt = (entry, score, layer, head) => entry.scores[score]?.[layer]?.[head] ?? null;

// The score of a head as it is shown: itself, or the difference from the step or run it is compared with.
function shownScore(score, layer, head) {
  const value = scoreAt(run.steps[state.step], score, layer, head);
  const compared = comparedWith();
  if (!compared || value === null) return value;
  const other = scoreAt(page.runs[compared[0]].steps[compared[1]], score, layer, head);
  return other === null ? null : value - other;
}

function shownScoreText(value, digits) {
  if (value === null) return "–";
  return state.compare ? signed(value, digits) : fixed(value, digits);
}

function scoreColour(score, value) {
  const { low, high } = page.scores[score];
  return state.compare ? divergingColour(value / (high - low)) : sequentialColour((value - low) / (high - low));
}

function buildGrid() {
  const corner = create("th", { class: "corner" }, create("span", { class: "visually-hidden" }, "layer"));
  const names = range(run.heads).map((h) => create("th", { scope: "col" }, `H${h}`));
  grid.cells = range(run.layers).map((l) => range(run.heads).map((h) =>
    create("td", { role: "gridcell", "data-layer": l, "data-head": h },
      create("span", { class: "score" }), create("span", { class: "effect", "aria-hidden": "true" }))));
  const row = (...cells) => create("tr", { role: "row" }, ...cells);
  const rows = grid.cells.map((cells, l) => row(create("th", { scope: "row" }, `L${l}`), ...cells));
  byId("grid").replaceChildren(create("tbody", {}, row(corner, ...names), ...rows));
  byId("grid").classList.toggle("dense", run.heads > 8);
}

function drawCell(cell, score, layer, head) {
  const value = shownScore(score, layer, head);
  const colour = value === null ? null : scoreColour(score, value);
  cell.style.background = colour ? css(colour) : "";
  cell.style.color = colour ? textColourOn(colour) : "";
  const text = shownScoreText(value, Math.abs(value) >= 10 ? 1 : 2);
  const ablation = ablationOf(score);
  const label = effectLabel(score, layer, head);
  const effect = ablation?.mean[layer][head][0][0];
  const [number, mark] = cell.children;
  number.textContent = run.heads > 8 ? text.replace(/^([+−]?)0\./, "$1.") : text;
  mark.className = `effect ${label?.kind || ""}`;
  mark.textContent = !ablation ? "" : label.kind === "caution" ? "∅" : signed(effect);
  mark.style.setProperty("--share", ablation?.largest > 0 ? Math.max(0, effect) / ablation.largest : 0);
  cell.dataset.value = value ?? "";
  const scoreText = `${page.scores[score].title} ${value === null ? "not measured" : fixed(value)}`;
  const ablated = ablation ? `, mean ablation ${signed(effect)} ${ablation.unit}, ${label.text}` : "";
  cell.setAttribute("aria-label", `${headName(layer, head)}, ${scoreText}${ablated}`);
}

function drawGrid() {
  const { score } = state;
  if (!grid.cells.length) buildGrid();
  const drawn = [score, state.step, state.compare].join(" ");
  grid.cells.forEach((row, l) => row.forEach((cell, h) => {
    if (grid.drawn !== drawn) drawCell(cell, score, l, h);
    const selected = l === state.layer && h === state.head;
    cell.setAttribute("aria-selected", selected);
    cell.tabIndex = selected ? 0 : -1;
  }));
  grid.drawn = drawn;
  drawScoreScale(score);
  byId("effect-key").hidden = !ablationOf(score);
  drawAblation(score);
}

function drawScoreScale(score) {
  const { description, low, high } = page.scores[score];
  byId("score-description").textContent = byId("score").title = description;
  const [from, to] = state.compare ? [low - high, high - low] : [low, high];
  byId("grid-low").textContent = String(Number(from.toFixed(3))).replace("-", "−");
  byId("grid-high").textContent = String(Number(to.toFixed(3)));
  const scale = state.compare ? gradient(divergingColour, -1, 1) : gradient(sequentialColour, 0, 1);
  byId("grid-scale").style.background = scale;
}

function intervalCell(interval) {
  if (!interval) return create("td", {}, "–");
  const [value, low, high] = interval;
  const bounds = create("span", { class: "interval" }, `${fixed(low)} to ${fixed(high)}`);
  return create("td", {}, create("b", {}, signed(value)), " ", bounds);
}

// The selected head's score, and what ablating it does, with 95% intervals.
function drawAblation(score) {
  const { layer, head } = state;
  const value = shownScore(score, layer, head);
  const text = value === null ? "not measured" : shownScoreText(value, 3);
  const title = ` ${page.scores[score].title} `;
  byId("head-score").replaceChildren(create("strong", {}, headName(layer, head)), title, create("strong", {}, text));
  const ablation = ablationOf(score);
  if (!ablation) {
    byId("ablation").replaceChildren(create("p", { class: "absent" }, "Ablation was not measured for this score."));
    return;
  }
  const label = effectLabel(score, layer, head);
  const columns = ["", "this head", "another head", "difference"].map((name) => create("th", { scope: "col" }, name));
  const rows = ["zero", "mean"].map((method) => {
    const cells = ablation[method][layer][head].map(intervalCell); // effect, control, difference
    return create("tr", {}, create("th", { scope: "row" }, method), ...cells);
  });
  byId("ablation").replaceChildren(
    create("p", {}, ablation.caption),
    create("table", {}, create("thead", {}, create("tr", {}, ...columns)), create("tbody", {}, ...rows)),
    create("p", { class: `label ${label.kind}` }, label.text),
  );
}
