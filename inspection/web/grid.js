// All heads: a score of each, and the effect of ablating it. Effects, intervals and labels come from Python.

const grid = { drawn: "", cells: [] };

const scoreAt = (entry, layer, head) => entry.scores[state.score]?.[layer]?.[head] ?? null;
const scoreText = (value, digits) => (state.compare ? signed : fixed)(value ?? NaN, digits);

// The score of a head as it is shown: itself, or the difference from the step or run it is compared with.
function shownScore(layer, head) {
  const value = scoreAt(run.steps[state.step], layer, head);
  const compared = comparedWith();
  if (!compared || value === null) return value;
  const other = scoreAt(page.runs[compared[0]].steps[compared[1]], layer, head);
  return other === null ? null : value - other;
}

function buildGrid() {
  grid.cells = allHeads.map(({ layer, head }) =>
    create("td", { role: "gridcell", "data-change": JSON.stringify({ layer, head, key: -1 }) },
      create("span", { class: "score" }), create("span", { class: "effect", "aria-hidden": "true" })));
  const corner = create("th", { class: "corner" }, create("span", { class: "visually-hidden" }, "layer"));
  const names = range(run.heads).map((h) => create("th", { scope: "col" }, `H${h}`));
  const rows = range(run.layers).map((l) => create("tr", { role: "row" },
    create("th", { scope: "row" }, `L${l}`), ...grid.cells.slice(l * run.heads, (l + 1) * run.heads)));
  byId("grid").append(create("tbody", {}, create("tr", { role: "row" }, corner, ...names), ...rows));
  byId("grid").classList.toggle("dense", run.heads > 8);
}

function drawCell(cell, { layer, head }) {
  const { title, low, high, ablation } = page.scores[state.score];
  const value = shownScore(layer, head);
  const share = (value - (state.compare ? 0 : low)) / (high - low);
  const colour = value === null ? null : (state.compare ? divergingColour : sequentialColour)(share);
  cell.style.background = colour ? css(colour) : "";
  cell.style.color = colour ? textColourOn(colour) : "";
  const [number, mark] = cell.children;
  const text = scoreText(value, Math.abs(value) >= 10 ? 1 : 2);
  number.textContent = run.heads > 8 ? text.replace(/^([+−]?)0\./, "$1.") : text;
  cell.dataset.value = value ?? "";
  cell.ariaLabel = `${headName(layer, head)}, ${title} ${value === null ? "not measured" : fixed(value)}`;
  mark.textContent = "";
  if (!ablation) return;
  const [effect, label] = [ablation.mean[layer][head][0][0], ablation.labels[layer][head]];
  mark.className = `effect ${label.kind}`;
  mark.textContent = label.kind === "caution" ? "∅" : signed(effect);
  mark.style.setProperty("--share", ablation.largest > 0 ? Math.max(0, effect) / ablation.largest : 0);
  cell.ariaLabel += `, mean ablation ${signed(effect)} ${ablation.unit}, ${label.text}`;
}

function drawGrid() {
  if (!grid.cells.length) buildGrid();
  const drawn = [state.score, state.step, state.compare].join(" ");
  allHeads.forEach(({ layer, head }, k) => {
    if (grid.drawn !== drawn) drawCell(grid.cells[k], { layer, head });
    const selected = layer === state.layer && head === state.head;
    grid.cells[k].ariaSelected = selected;
    grid.cells[k].classList.toggle("off", state.text === OWN && namesOff().includes(headName(layer, head)));
    grid.cells[k].tabIndex = selected ? 0 : -1;
  });
  grid.drawn = drawn;
  drawScoreScale();
  drawAblation();
}

function drawScoreScale() {
  const { description, low, high, ablation } = page.scores[state.score];
  byId("score-description").textContent = description;
  const [from, to] = state.compare ? [low - high, high - low] : [low, high];
  byId("grid-low").textContent = String(Number(from.toFixed(3))).replace("-", "−");
  byId("grid-high").textContent = String(Number(to.toFixed(3)));
  const scale = state.compare ? gradient(divergingColour, -1) : gradient(sequentialColour, 0);
  byId("grid-scale").style.background = scale;
  byId("effect-key").hidden = !ablation;
}

function intervalCell([value, low, high]) {
  if (value === null) return create("td", {}, "–");
  const bounds = create("span", { class: "interval" }, `${fixed(low)} to ${fixed(high)}`);
  return create("td", {}, create("b", {}, signed(value)), " ", bounds);
}

// The selected head's score, and what ablating it does, with 95% intervals.
function drawAblation() {
  const { score, layer, head } = state;
  const { title, ablation } = page.scores[score];
  const value = shownScore(layer, head);
  const text = value === null ? "not measured" : scoreText(value, 3);
  const strong = (part) => create("strong", {}, part);
  byId("head-score").replaceChildren(strong(headName(layer, head)), ` ${title} `, strong(text));
  if (!ablation) {
    byId("ablation").replaceChildren(create("p", { class: "absent" }, "Ablation was not measured for this score."));
    return;
  }
  const columns = ["", "this head", "another head", "difference"].map((name) => create("th", { scope: "col" }, name));
  const rows = ["zero", "mean"].map((method) =>
    create("tr", {}, create("th", { scope: "row" }, method), ...ablation[method][layer][head].map(intervalCell)));
  const label = ablation.labels[layer][head];
  byId("ablation").replaceChildren(
    create("p", {}, ablation.caption),
    create("table", {}, create("thead", {}, create("tr", {}, ...columns)), create("tbody", {}, ...rows)),
    create("p", { class: `label ${label.kind}` }, label.text),
  );
}
