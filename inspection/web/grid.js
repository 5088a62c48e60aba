// All heads at once: a score of each, coloured, and beside it what taking the head away does.

const HIGH = 0.5; // a head that puts half of its weight on something reads it
const WAYS = ["zero", "mean"];

const gridView = { name: "", cells: [] };

function measureOf(score) {
  const name = about.scores[score]?.measure;
  return (about.evidence && about.evidence.measures && about.evidence.measures[name]) || null;
}

// What taking a head away does: { zero: {effect, control, difference}, mean: {...}, verdict, unit }, or null.
function effectOf(score, layer, head) {
  const measure = measureOf(score);
  if (!measure) return null;
  const cell = (name) => interval(measure[name]?.[layer]?.[head]);
  const found = { unit: String(measure.unit), count: measure.count };
  for (const way of WAYS) {
    found[way] = { effect: cell(way), control: cell(`control_${way}`), difference: cell(`difference_${way}`) };
  }
  if (!found.zero.effect || !found.mean.effect) return null;
  found.verdict = verdictOf(WAYS.map((way) => found[way]));
  return found;
}

// As inspection/findings.py `verdict` has it.
function verdictOf(ways) {
  const more = ways.map((way) => (way.difference || way.effect).low > 0);
  if (more.some(Boolean)) return more.every(Boolean) ? "supported" : "disputed";
  return ways.every((way) => way.effect.low > 0) ? "same as control" : "no effect";
}

// The scores of a step as they are shown: themselves, or the difference from those of what is compared with.
function scoreTable(score, step = state.step) {
  const mine = run.steps[step].scores[score] || null;
  const other = opponent();
  if (!mine || !other) return mine;
  const theirs = about.runs[other[0]].steps[other[1]].scores[score];
  const less = (value, l, h) => {
    const against = theirs?.[l]?.[h] ?? null;
    return value === null || against === null ? null : value - against;
  };
  return mine.map((row, l) => row.map((value, h) => less(value, l, h)));
}

// The limits of a score's colours: those of its definition, else the largest value of all steps.
function limitsOf(score) {
  const { low, high } = about.scores[score];
  if (high !== null) return [low, high];
  let most = low;
  for (const r of about.runs) for (const { scores } of r.steps) {
    for (const value of (scores[score] || []).flat()) if (value > most) most = value;
  }
  return [low, most > low ? most : low + 1];
}

function scoreColour(score, value) {
  const [low, high] = limitsOf(score);
  return state.against ? differenceColour(value / (high - low)) : shareColour((value - low) / (high - low));
}

function buildGrid() {
  const rows = [];
  const corner = make("th", { scope: "col", class: "corner" }, make("span", { class: "visually-hidden" }, "layer"));
  const names = Array.from({ length: run.heads }, (_, h) => make("th", { scope: "col" }, `H${h}`));
  rows.push(make("tr", { role: "row" }, corner, ...names));
  gridView.cells = Array.from({ length: run.layers }, (_, l) => {
    const cells = Array.from({ length: run.heads }, (_, h) => {
      const parts = [make("span", { class: "score" }), make("span", { class: "effect", "aria-hidden": "true" })];
      return make("td", { role: "gridcell", tabindex: "-1", "data-layer": l, "data-head": h }, ...parts);
    });
    rows.push(make("tr", { role: "row" }, make("th", { scope: "row" }, `L${l}`), ...cells));
    return cells;
  });
  fill(find("grid"), make("tbody", {}, ...rows));
  find("grid").classList.toggle("dense", run.heads > 8);
}

// The words of a cell, for those who hear it.
function cellWords(score, value, effect, l, h) {
  const said = [headName(l, h), `${about.scores[score].title} ${value === null ? "not measured" : fixed(value)}`];
  if (effect) said.push(`taken away ${signed(effect.mean.effect.value)} ${effect.unit}`);
  if (isHollow(score, value, effect)) said.push(CAUTIONS[effect.verdict]);
  return said.join(", ");
}

// A head that reads what it is asked about, and without which no more is lost than without another.
function isHollow(score, value, effect) {
  return Boolean(effect) && about.scores[score].weight && !state.against && value >= HIGH && effect.verdict in CAUTIONS;
}

function drawCell(cell, score, value, effect, most) {
  const [l, h] = [Number(cell.dataset.layer), Number(cell.dataset.head)];
  const colour = value === null ? null : scoreColour(score, value);
  cell.style.background = colour ? css(colour) : "";
  cell.style.color = colour ? inkOn(colour) : "";
  const digits = Math.abs(value) >= 10 ? 1 : 2;
  const text = value === null ? "–" : state.against ? signed(value, digits) : fixed(value, digits);
  const [number, mark] = cell.children;
  number.textContent = run.heads > 8 ? text.replace(/^([+−]?)0\./, "$1.") : text;
  const hollow = isHollow(score, value, effect);
  mark.className = `effect ${effect && !(effect.verdict in CAUTIONS) ? "clear" : ""} ${hollow ? "hollow" : ""}`;
  mark.textContent = effect ? (hollow ? "∅" : signed(effect.mean.effect.value)) : "";
  mark.style.setProperty("--share", effect && most > 0 ? Math.max(0, effect.mean.effect.value) / most : 0);
  cell.dataset.value = value ?? "";
  cell.setAttribute("aria-label", cellWords(score, value, effect, l, h));
}

function drawGrid() {
  const score = state.score;
  const table = scoreTable(score);
  const name = [score, state.step, state.against].join(" ");
  if (!gridView.cells.length) buildGrid();
  if (gridView.name !== name) {
    const all = gridView.cells.flatMap((row, l) => row.map((_, h) => effectOf(score, l, h)));
    const most = Math.max(0, ...all.map((one) => one?.mean.effect.value ?? 0));
    gridView.cells.forEach((row, l) => row.forEach((cell, h) => {
      drawCell(cell, score, table?.[l]?.[h] ?? null, all[l * run.heads + h], most);
    }));
    gridView.name = name;
    drawScoreWords(score);
  }
  gridView.cells.forEach((row, l) => row.forEach((cell, h) => {
    const chosen = l === state.layer && h === state.head;
    cell.setAttribute("aria-selected", chosen);
    cell.tabIndex = chosen ? 0 : -1;
  }));
  find("effect-key").hidden = !measureOf(score);
  drawEffect(score, table?.[state.layer]?.[state.head] ?? null);
}

function drawScoreWords(score) {
  const { formula, source, on } = about.scores[score] || {};
  const said = [formula, on && `measured on ${on}`, source].filter(Boolean).join("; ");
  find("score-formula").textContent = said;
  find("score").title = said;
  const [low, high] = limitsOf(score);
  const span = high - low;
  const shown = state.against ? [-span, span] : [low, high];
  find("grid-low").textContent = short(shown[0]).replace(/\.?0+$/, "") || "0";
  find("grid-high").textContent = short(shown[1]).replace(/\.?0+$/, "");
  find("grid-scale").style.background = state.against ? gradient(differenceColour, -1, 1) : gradient(shareColour, 0, 1);
}

// The heads that a claim is about: one, or several that only matter together.
function headsOf(claim) {
  const others = Array.isArray(claim.others) ? claim.others : [];
  return [claim.head, ...others].filter(Array.isArray);
}
const claimHeads = (claim) => headsOf(claim).map(([layer, head]) => headName(layer, head)).join(" + ");

// A claim by which the chosen head matters together with others, if there is one.
function sharedClaim(score) {
  const holds = ([layer, head]) => layer === state.layer && head === state.head;
  return about.findings.find((one) => one && one.score === score && headsOf(one).length > 1 && headsOf(one).some(holds));
}

const MEASURES = { repeats: "loss on repeats", corpus: "loss on held-out text" };
const VERDICTS = {
  supported: "matters: both ways hurt more than another head",
  disputed: "disputed: one way hurts more than another head, one does not",
  "same as control": "it hurts no more than another head",
  "no effect": "no effect: its interval holds 0",
};
const CAUTIONS = {
  "same as control": "high weight, no effect beyond that of another head",
  "no effect": "high weight, no effect",
};

// The read-out of the chosen head: its score, and what is lost without it, with 95 % intervals.
function drawEffect(score, value) {
  const effect = effectOf(score, state.layer, state.head);
  const name = headName(state.layer, state.head);
  const shown = value === null ? "not measured" : state.against ? signed(value, 3) : fixed(value, 3);
  fill(find("head-score"), make("strong", {}, name), ` ${about.scores[score]?.title || ""} `, make("strong", {}, shown));
  const box = find("effect");
  if (!effect) return fill(box, make("p", { class: "absent" }, "What taking it away does was not measured for this score."));
  const measure = about.scores[score].measure;
  const what = MEASURES[measure] || "fall of the right answer's lead";
  const head = ["", "this head", "a random other", "difference"].map((text) => make("th", { scope: "col" }, text));
  const rows = WAYS.map((way) => {
    const { effect: e, control, difference } = effect[way];
    const cells = [e, control, difference].map((cell) => make("td", {}, ...intervalParts(cell)));
    return make("tr", {}, make("th", { scope: "row" }, way), ...cells);
  });
  const hollow = isHollow(score, value, effect);
  const step = about.evidence.step;
  const verdict = hollow ? `∅ ${CAUTIONS[effect.verdict]}` : VERDICTS[effect.verdict];
  fill(
    box,
    make("p", {}, `Taken away: ${what}, ${effect.unit}; ${effect.count} items, 95 %, step ${step}`),
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
    make("p", { class: `verdict ${hollow ? "hollow" : ""}` }, verdict),
  );
  const shared = sharedClaim(score);
  if (shared) box.append(make("p", { class: "verdict" }, `${claimHeads(shared)} together: ${shared.effect}.`));
}
