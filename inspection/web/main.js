// Events change the state; the state is drawn. Nothing else draws.

let requests = 0;
let hashTimer = 0;
let announceTimer = 0;

// Applies changes to the state, loads what they need, and draws.
async function change(changes) {
  const started = performance.now();
  Object.assign(state, changes);
  const request = ++requests;
  if (!view || view.key !== viewKey()) {
    const loaded = await loadView();
    if (request !== requests) return; // the state changed again meanwhile
    view = loaded;
  }
  if (state.query < 0) state.query = initialQuery();
  state.query = Math.min(state.query, view.T - 1);
  if (state.key > state.query) state.key = -1;
  draw();
  root.dataset.redrawMs = (performance.now() - started).toFixed(1);
  root.dataset.drawn = stateToHash();
}

function draw() {
  drawControls();
  drawText();
  drawQuery();
  drawMatrix();
  drawGrid();
  drawTimeline();
  scheduleWalkthrough();
  clearTimeout(hashTimer); // browsers limit how often an address may change
  hashTimer = setTimeout(() => location.hash !== stateToHash() && history.replaceState(null, "", stateToHash()), 400);
  clearTimeout(announceTimer);
  announceTimer = setTimeout(() => (byId("live").textContent = spokenSummary()), 120);
}

function drawControls() {
  byId("text-choice").value = state.text;
  byId("step").value = state.step;
  byId("step").setAttribute("aria-valuetext", `step ${stepNumber(state.step)}`);
  byId("step-number").textContent = stepNumber(state.step).toLocaleString("en");
  byId("head-name").textContent = headName(state.layer, state.head);
  byId("value-weighted").checked = state.value_weighted;
  byId("compare").value = state.compare;
  byId("score").value = state.score;
  if (state.theme) root.dataset.theme = state.theme;
  const [wanted, shown] = [stepNumber(state.step), stepNumber(view.step)];
  const messages = [];
  if (shown !== wanted) messages.push(`This text is not stored at step ${wanted}; step ${shown} is shown.`);
  if (view.notice) messages.push(view.notice);
  else if (state.compare && !comparing()) messages.push("The other run has no such head.");
  byId("message").textContent = messages.join(" ");
  byId("message").hidden = !messages.length;
}

const moveQuery = (query) => change({ query: clamp(query, 0, view.T - 1), key: -1 });
const moveStep = (by) => change({ step: clamp(state.step + by, 0, run.steps.length - 1) });

function moveInGrid(layers, heads) {
  const layer = clamp(state.layer + layers, 0, run.layers - 1);
  const head = clamp(state.head + heads, 0, run.heads - 1);
  return change({ layer, head, key: -1 }).then(() => grid.cells[layer][head].focus());
}

// The next head, across layers.
function nextHead(by) {
  const count = run.layers * run.heads;
  const k = (state.layer * run.heads + state.head + by + count) % count;
  return change({ layer: Math.floor(k / run.heads), head: k % run.heads, key: -1 });
}

function toggleCompare() {
  if (state.compare) return change({ compare: "" });
  return change({ compare: secondRun ? "run" : String(stepNumber(0)) });
}

function toggleTheme() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return change({ theme: dark ? "light" : "dark" });
}

const KEYS = {
  ArrowLeft: () => moveQuery(state.query - 1),
  ArrowRight: () => moveQuery(state.query + 1),
  ArrowUp: () => moveQuery(tokenInLine(-1)),
  ArrowDown: () => moveQuery(tokenInLine(1)),
  Home: () => moveQuery(0),
  End: () => moveQuery(view.T - 1),
  Enter: () => change({ pinned: true }),
  Escape: () => change({ pinned: false, key: -1 }),
  "[": () => moveStep(-1),
  "]": () => moveStep(1),
  h: () => nextHead(-1),
  l: () => nextHead(1),
  v: () => change({ value_weighted: !state.value_weighted }),
  c: toggleCompare,
  d: downloadPng,
  s: downloadSvg,
  t: toggleTheme,
  "?": () => byId("help").showModal(),
};
const GRID_KEYS = {
  ArrowLeft: () => moveInGrid(0, -1),
  ArrowRight: () => moveInGrid(0, 1),
  ArrowUp: () => moveInGrid(-1, 0),
  ArrowDown: () => moveInGrid(1, 0),
};
const MATRIX_KEYS = {
  ArrowLeft: () => change({ key: clamp(selectedKey() - 1, 0, state.query) }),
  ArrowRight: () => change({ key: clamp(selectedKey() + 1, 0, state.query) }),
  ArrowUp: () => moveQuery(state.query - 1),
  ArrowDown: () => moveQuery(state.query + 1),
};
const FIELD_KEYS = /^(Arrow.*|Enter|Home|End)$/;

async function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (FIELD_KEYS.test(key) && target.closest("select, input[type=range], summary, button, .scroll")) return;
  const special = target.closest("#grid") ? GRID_KEYS : target.closest("#matrix") ? MATRIX_KEYS : {};
  const action = special[key] || KEYS[key];
  if (!action) return;
  event.preventDefault();
  matrix.hover = null;
  await action();
  scrollToQuery();
}

function listenToText() {
  const tokenAt = (event) => Number(event.target.closest(".tok")?.id.replace("token-", "") ?? -1);
  byId("text").addEventListener("pointerover", (event) => {
    const position = tokenAt(event);
    if (position < 0 || event.pointerType === "touch") return;
    if (!state.pinned) change({ query: position, key: -1 });
    else if (position <= state.query) change({ key: position });
  });
  byId("text").addEventListener("click", (event) => {
    const query = tokenAt(event);
    if (query >= 0) change({ query, key: -1, pinned: true });
  });
}

function listenToPictures() {
  byId("matrix").addEventListener("pointermove", (event) => hoverMatrix(cellAt(event)));
  byId("matrix").addEventListener("pointerleave", () => hoverMatrix(null));
  byId("matrix").addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) change({ query: cell[0], key: cell[1] <= cell[0] ? cell[1] : -1, pinned: true });
  });
  byId("grid").addEventListener("click", (event) => {
    const cell = event.target.closest("[data-head]");
    if (cell) change({ layer: Number(cell.dataset.layer), head: Number(cell.dataset.head), key: -1 });
  });
  byId("timeline").addEventListener("pointermove", hoverTimeline);
  byId("timeline").addEventListener("pointerleave", () => hoverTimeline(null));
  byId("timeline").addEventListener("click", (event) => {
    const { step, line: { layer, head } } = timelineAt(event);
    change({ step, layer, head, key: -1 });
  });
  byId("walkthrough").addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-key]");
    if (row) change({ key: Number(row.dataset.key) });
  });
  new IntersectionObserver((entries) => {
    walkthrough.visible = entries.at(-1).isIntersecting;
    if (view) scheduleWalkthrough();
  }, { rootMargin: "200px" }).observe(byId("walkthrough-section"));
  new ResizeObserver(() => view && drawMatrix()).observe(byId("matrix"));
}

function listenToControls() {
  const on = (id, type, changes) => byId(id).addEventListener(type, ({ target }) => change(changes(target)));
  on("text-choice", "change", ({ value }) => ({ text: Number(value), query: -1, key: -1, pinned: false }));
  on("step", "input", ({ value }) => ({ step: Number(value) }));
  on("score", "change", ({ value }) => ({ score: value }));
  on("value-weighted", "change", ({ checked }) => ({ value_weighted: checked }));
  on("compare", "change", ({ value }) => ({ compare: value }));
  for (const [id, key] of Object.entries({ png: "d", svg: "s", theme: "t", "help-open": "?" })) {
    byId(id).addEventListener("click", () => KEYS[key]());
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => location.hash !== stateToHash() && change(stateFromHash(location.hash)));
}

// A button for a finding: it selects the head, and a text on which the score is measured.
function findingButton(finding) {
  const { head: [layer, head], score, title, attention, text, at_end: atEnd } = finding;
  const attributes = { type: "button", class: finding.supported ? "supported" : null, title: finding.summary };
  const number = create("span", { class: "number" }, ` ${fixed(attention)}`);
  const button = create("button", attributes, create("strong", {}, headName(layer, head)), ` ${title}`, number);
  button.addEventListener("click", () => {
    const step = text === null ? -1 : nearestStep(0, state.step, text);
    if (step < 0) return change({ layer, head, score, key: -1 });
    return change({ layer, head, score, text, query: atEnd ? storedText(0, step, text).tokens - 1 : -1, key: -1 });
  });
  return button;
}

function fillPage() {
  const steps = run.steps.length === 1 ? `step ${stepNumber(0)}` : `${run.steps.length} steps`;
  byId("title").textContent = page.title;
  byId("shape").textContent = `${run.layers} layers × ${run.heads} heads, ${steps}`;
  byId("headline").textContent = page.headline;
  byId("findings").replaceChildren(...page.findings.map(findingButton));
  byId("notes").textContent = page.notes.join(" ");
  const options = (id, entries) =>
    byId(id).replaceChildren(...entries.map(([value, text]) => create("option", { value }, text)));
  options("text-choice", [...page.texts.entries()].filter(([k]) => nearestStep(0, 0, k) >= 0));
  options("score", Object.entries(page.scores).map(([name, { title }]) => [name, title]));
  const otherRun = secondRun ? [["run", secondRun.label]] : [];
  options("compare", [["", "nothing"], ...otherRun, ...run.steps.map(({ step }) => [String(step), `step ${step}`])]);
  setAttributes(byId("step"), { min: 0, max: run.steps.length - 1, step: 1 });
  byId("step").disabled = run.steps.length < 2;
}

async function start() {
  fillPage();
  listenToControls();
  listenToText();
  listenToPictures();
  await change(stateFromHash(location.hash));
  scrollToQuery();
  root.dataset.ready = performance.now().toFixed(0);
}

start().catch((error) => {
  byId("message").hidden = false;
  byId("message").textContent = typeof DecompressionStream === "undefined"
    ? "This browser cannot decompress the page; it needs Chrome 80, Firefox 113, Safari 16.4 or newer."
    : `The page could not be drawn: ${error.message}`;
  throw error;
});
