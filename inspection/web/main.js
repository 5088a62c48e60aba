// What moves the page: controls, keys and pointer change the state; the state is drawn. Nothing else draws.

let turn = 0;
let announcing = 0;
let linking = 0;

// The step and the text may have no such token; heads and scores always exist.
function settle() {
  const { T } = scene.side;
  if (state.query < 0) state.query = tellingQuery();
  state.query = Math.min(state.query, T - 1);
  if (state.key > state.query) state.key = -1;
  if (!scoreNames(state.step).includes(state.score)) state.score = scoreNames(state.step)[0] || state.score;
}

// Take over what changed, fetch the numbers if others are needed, and draw.
async function change(changes) {
  const started = performance.now();
  Object.assign(state, changes);
  const mine = ++turn;
  if (!scene || scene.name !== sceneName()) {
    const found = await gather();
    if (mine !== turn) return; // something newer was asked for meanwhile
    scene = found;
  }
  settle();
  draw();
  root.dataset.redrawMs = (performance.now() - started).toFixed(1);
  root.dataset.drawn = toHash();
}

function draw() {
  drawControls();
  drawText();
  drawToken();
  drawMatrix();
  drawLegend();
  drawGrid();
  drawTimeline();
  schedulePanel();
  clearTimeout(linking);
  linking = setTimeout(keepLink, 400); // browsers refuse an address that changes with every token
  clearTimeout(announcing);
  announcing = setTimeout(() => (find("live").textContent = sentenceOf()), 120);
}

function keepLink() {
  if (location.hash !== toHash()) history.replaceState(null, "", toHash());
}

function drawControls() {
  find("text-choice").value = state.text;
  find("step").value = state.step;
  find("step").setAttribute("aria-valuetext", `step ${stepNumber(state.step)}`);
  find("step-number").textContent = stepNumber(state.step).toLocaleString("en");
  find("head-name").textContent = headName(state.layer, state.head);
  find("weigh").checked = state.weigh;
  find("against").value = state.against;
  find("score").value = state.score;
  root.classList.toggle("comparing", Boolean(state.against));
  const said = [];
  if (scene.step !== state.step) said.push(otherStepWords(stepNumber(scene.step)));
  if (scene.refusal) said.push(scene.refusal);
  else if (state.against && !differs()) said.push("The other one has no such head.");
  find("message").textContent = said.join(" ");
  find("message").hidden = !said.length;
}

const otherStepWords = (step) =>
  `The page keeps this text at step ${step}, not at ${stepNumber(state.step)}; step ${step} is shown.`;
const move = (query) => change({ query: Math.max(0, Math.min(scene.side.T - 1, query)), key: -1 });
const moveStep = (by) => change({ step: Math.max(0, Math.min(run.steps.length - 1, state.step + by)) });

// Another head, by layers and heads; it stops at the edges.
function moveHead(layers, heads) {
  const layer = Math.max(0, Math.min(run.layers - 1, state.layer + layers));
  const head = Math.max(0, Math.min(run.heads - 1, state.head + heads));
  return change({ layer, head, key: -1 });
}

// The next head in reading order, over the ends of layers.
function nextHead(by) {
  const all = run.layers * run.heads;
  const n = (state.layer * run.heads + state.head + by + all) % all;
  return change({ layer: Math.floor(n / run.heads), head: n % run.heads, key: -1 });
}

function toggleCompare() {
  if (state.against) return change({ against: "" });
  return change({ against: second ? "other" : String(stepNumber(state.step > 0 ? 0 : state.step)) });
}

function setTheme(theme) {
  state.theme = theme;
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
}

function toggleTheme() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
  change({});
}

const KEYS = {
  ArrowLeft: () => move(state.query - 1),
  ArrowRight: () => move(state.query + 1),
  ArrowUp: () => move(tokenOnLine(-1)),
  ArrowDown: () => move(tokenOnLine(1)),
  Home: () => move(0),
  End: () => move(scene.side.T - 1),
  Enter: () => change({ pinned: true }),
  Escape: () => change({ pinned: false, key: -1 }),
  "[": () => moveStep(-1),
  "]": () => moveStep(1),
  h: () => nextHead(-1),
  l: () => nextHead(1),
  v: () => change({ weigh: !state.weigh }),
  c: toggleCompare,
  d: downloadPng,
  s: downloadSvg,
  t: toggleTheme,
  "?": () => find("help").showModal(),
};
const GRID_KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const KEY_KEYS = { ArrowLeft: -1, ArrowRight: 1 };
const MATRIX_ROWS = { ArrowUp: -1, ArrowDown: 1 };

// Which action a key has where the focus is; fields keep their own keys.
function actionOf(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return null;
  const field = target.closest("select, input[type=range], summary, button, a, .scroll");
  const own = key.startsWith("Arrow") || ["Enter", "Home", "End"].includes(key);
  if (field && own) return null;
  if (target.closest("#grid") && GRID_KEYS[key]) return () => moveHead(...GRID_KEYS[key]).then(focusHead);
  if (target.id === "matrix" && KEY_KEYS[key]) {
    return () => change({ key: Math.max(0, Math.min(state.query, shownKey() + KEY_KEYS[key])) });
  }
  if (target.id === "matrix" && MATRIX_ROWS[key]) return () => move(state.query + MATRIX_ROWS[key]);
  return KEYS[key] || null;
}

const focusHead = () => gridView.cells[state.layer][state.head].focus();

function onKey(event) {
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  matrixView.hover = null;
  Promise.resolve(action()).then(() => textView.spans.length && scrollToQuery());
}

const tokenAt = (event) => {
  const span = event.target.closest(".tok");
  return span ? Number(span.id.slice(6)) : -1;
};

function listenToText() {
  const box = find("text");
  box.addEventListener("pointerover", (event) => {
    const k = tokenAt(event);
    if (k < 0 || event.pointerType === "touch") return;
    if (!state.pinned) change({ query: k, key: -1 });
    else if (k <= state.query) change({ key: k });
  });
  box.addEventListener("click", (event) => {
    const k = tokenAt(event);
    if (k >= 0) change({ query: k, key: -1, pinned: true });
  });
}

function listenToMatrix() {
  const canvas = find("matrix");
  canvas.addEventListener("pointermove", hoverMatrix);
  canvas.addEventListener("pointerleave", () => hoverMatrix(null));
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) change({ query: cell[0], key: cell[1] <= cell[0] ? cell[1] : -1, pinned: true });
  });
}

function listenToHeads() {
  find("grid").addEventListener("click", (event) => {
    const cell = event.target.closest("[data-head]");
    if (cell) change({ layer: Number(cell.dataset.layer), head: Number(cell.dataset.head), key: -1 });
  });
  const line = find("timeline");
  line.addEventListener("pointermove", hoverTimeline);
  line.addEventListener("pointerleave", () => hoverTimeline(null));
  line.addEventListener("click", (event) => {
    const { step, line: { l, h } } = nearestLine(event);
    change({ step, layer: l, head: h, key: -1 });
  });
}

function listenToPanel() {
  find("panel").addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-key]");
    if (row) change({ key: Number(row.dataset.key) });
  });
  const watch = new IntersectionObserver((entries) => {
    panelView.visible = entries.some((entry) => entry.isIntersecting);
    if (panelView.visible && scene) schedulePanel();
  }, { rootMargin: "200px" });
  watch.observe(find("how"));
}

function listenToControls() {
  const another = { query: -1, key: -1, pinned: false };
  find("text-choice").addEventListener("change", (e) => change({ text: Number(e.target.value), ...another }));
  find("step").addEventListener("input", (e) => change({ step: Number(e.target.value) }));
  find("score").addEventListener("change", (e) => change({ score: e.target.value }));
  find("weigh").addEventListener("change", (e) => change({ weigh: e.target.checked }));
  find("against").addEventListener("change", (e) => change({ against: e.target.value }));
  for (const [id, key] of Object.entries({ png: "d", svg: "s", theme: "t", "help-open": "?" })) {
    find(id).addEventListener("click", () => KEYS[key]());
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => {
    if (location.hash === toHash()) return;
    firstView();
    const found = fromHash(location.hash);
    if (found.theme) setTheme(found.theme);
    change(found);
  });
  new ResizeObserver(() => scene && drawMatrix()).observe(find("matrix"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => scene && drawMatrix());
}

const choices = (select, entries) => fill(select, ...entries.map(([value, text]) => make("option", { value }, text)));

function fillChoices() {
  const shown = about.texts.map((name, k) => [k, name]).filter(([k]) => nearestStep(0, 0, k) >= 0);
  choices(find("text-choice"), shown);
  choices(find("score"), Object.entries(about.scores).map(([name, { title }]) => [name, title]));
  const steps = run.steps.map((entry) => [String(entry.step), `step ${entry.step}`]);
  choices(find("against"), [["", "nothing"], ...(second ? [["other", second.label]] : []), ...steps]);
  Object.assign(find("step"), { min: 0, max: run.steps.length - 1, step: 1 });
  find("step").disabled = run.steps.length < 2;
}

// A claim's button leads to its head, and to a text where that head is asked.
function claimButton(claim) {
  const [layer, head] = Array.isArray(claim.head) ? claim.head : [];
  if (!(layer >= 0 && layer < run.layers && head >= 0 && head < run.heads)) return null;
  const words = (about.scores[claim.score]?.title || String(claim.score)).split(":")[0];
  const button = make("button", { type: "button", class: `claim ${claim.label === "supported" ? "supported" : ""}` });
  const weight = make("span", { class: "number" }, ` ${fixed(claim.value)}`);
  button.append(make("strong", {}, claimHeads(claim)), ` ${words}`, weight);
  button.title = String(claim.summary || "");
  button.addEventListener("click", () => {
    const kind = String(claim.score).replace(/^antecedent\./, "");
    const wanted = String(claim.score).startsWith("antecedent.") ? `${kind} 1` : "repeat 1";
    const text = about.texts.indexOf(wanted);
    const found = { layer, head, key: -1, score: claim.score in about.scores ? claim.score : state.score };
    const step = text < 0 ? -1 : nearestStep(0, state.step, text);
    if (step < 0) return change(found);
    const last = textAt(0, step, text).tokens - 1; // where the answer is due
    return change({ ...found, text, query: wanted === "repeat 1" ? -1 : last });
  });
  return button;
}

function introduce() {
  const steps = run.steps.length === 1 ? `step ${stepNumber(0)}` : `${run.steps.length} steps`;
  find("title").textContent = about.title;
  find("shape").textContent = `${run.layers} layers × ${run.heads} heads, ${steps}`;
  find("headline").textContent = about.headline || "What each attention head reads, token by token.";
  fill(find("claims"), ...about.findings.filter((one) => one).map(claimButton).filter(Boolean));
  find("notes").textContent = about.notes.join(" ");
  find("notes").hidden = !about.notes.length;
}

async function start() {
  introduce();
  fillChoices();
  firstView();
  const found = fromHash(location.hash);
  if (found.theme) setTheme(found.theme);
  listenToControls();
  listenToText();
  listenToMatrix();
  listenToHeads();
  listenToPanel();
  await change(found);
  scrollToQuery();
  performance.mark("ready");
  root.dataset.ready = performance.now().toFixed(0);
}

start().catch((error) => {
  find("message").hidden = false;
  find("message").textContent = typeof DecompressionStream === "undefined"
    ? "This browser cannot unpack the page: it takes Chrome 80, Firefox 113, Safari 16.4 or newer."
    : `The page could not be drawn: ${error.message}`;
  root.dataset.failed = "1";
  throw error;
});
