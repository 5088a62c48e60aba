// Events change the state; the state is drawn. Nothing else draws.

let requests = 0;

// Whether the view is that of the state, not an older one while another is loading.
const isLoaded = () => view?.key === viewKey();

// Applies changes to the state, loads what they need, and draws. A comparison starts with a text that both sides have.
async function change(changes, scroll = true) {
  Object.assign(state, changes);
  const request = ++requests;
  if (!isLoaded()) {
    let loaded = await loadView();
    if (changes.compare && changes.text === undefined && !loaded.other) loaded = await loadComparable() ?? loaded;
    if (request !== requests) return; // the state changed again meanwhile
    view = loaded;
    if (view.text !== state.text) Object.assign(state, { text: view.text, query: -1, key: -1 });
    if (state.text === OWN) state.query = view.shown;
    view.key = viewKey();
  }
  if (state.query < 0 || state.query === Infinity) state.query = view.shown ?? initialQuery();
  state.query = Math.min(state.query, view.T - 1);
  if (state.key > state.query) state.key = -1;
  for (const draw of [drawControls, drawText, drawQuery, drawMatrix, drawGrid, drawTimeline, drawExperiments, drawLesson]) draw();
  if (scroll) scrollToQuery();
  root.dataset.drawn = stateToHash();
  const later = (action, milliseconds) => setTimeout(() => request === requests && action(), milliseconds);
  later(drawWalkthrough, 40);
  later(announce, 120);
  later(updateAddress, 400); // browsers limit how often it may change
}

const hasAddress = location.protocol !== "about:"; // a notebook's frame has none
const updateAddress = () => hasAddress && location.hash !== stateToHash() && history.replaceState(null, "", stateToHash());
const announce = () => { byId("live").textContent = spokenSummary(); };

const controls = document.querySelectorAll("[name]:not(meta)"); // the name of each is that of its part of the state

function drawControls() {
  for (const control of controls) {
    const property = control.type === "checkbox" ? "checked" : "value";
    if (control[property] !== state[control.name]) control[property] = state[control.name]; // keeps the cursor in a text
  }
  const [wanted, shown] = [stepNumber(state.step), stepNumber(view.step)];
  byId("step").setAttribute("aria-valuetext", `step ${wanted}`);
  byId("step-number").textContent = wanted.toLocaleString("en");
  byId("head-name").textContent = headName(state.layer, state.head);
  const missing = shown === wanted ? "" : `This text is not stored at step ${wanted}; step ${shown} is shown. `;
  const cannot = "Attention cannot be compared: the other step or run lacks this head or text, or has other tokens.";
  const leftOut = state.text === OWN ? charactersWithoutToken(page.model.tokenizer, state.own) : [];
  const unknown = leftOut.length ? `No token has the characters ${leftOut.slice(0, 20).join(" ")}; they are left out. ` : "";
  showMessage(missing + unknown + (state.compare && !comparing() ? `${cannot} Choose another text.` : ""));
}

function showMessage(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

const moveQuery = (query) => change({ query: clamp(query, 0, view.T - 1), key: -1 });
const moveStep = (by) => change({ step: clamp(state.step + by, 0, run.steps.length - 1) });

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

// An arrow key moves the head in the grid, query or key in the matrix, and the query token anywhere else.
async function moveByArrow(target, [rows, columns]) {
  if (target.closest("#grid")) {
    const layer = clamp(state.layer + rows, 0, run.layers - 1);
    const head = clamp(state.head + columns, 0, run.heads - 1);
    await change({ layer, head, key: -1 });
    return byId("grid").querySelector("[tabindex='0']").focus();
  }
  if (rows || !target.closest("#matrix")) return moveQuery(state.query + rows + columns);
  return change({ key: clamp(selectedKey() + columns, 0, state.query) });
}

const KEYS = {
  Home: () => moveQuery(0),
  End: () => moveQuery(view.T - 1),
  Enter: () => change({ pinned: true }),
  Escape: () => change({ pinned: false, key: -1 }),
  "[": () => moveStep(-1),
  "]": () => moveStep(1),
  v: () => change({ value_weighted: !state.value_weighted }),
  c: () => change({ compare: state.compare ? "" : secondRun ? "run" : String(stepNumber(0)) }),
  d: downloadMatrix,
  x: () => page.model && toggle(headName(state.layer, state.head)),
  m: () => page.model && toggle(mlpName(state.layer)),
  "?": () => byId("help").showModal(),
};
const FIELD_KEYS = /^(Arrow.*|Enter|Home|End)$/;

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (target.closest("textarea, input[type=number]")) return;
  if (FIELD_KEYS.test(key) && target.closest("select, input[type=range], button, .scroll")) return;
  const action = ARROWS[key] ? () => moveByArrow(target, ARROWS[key]) : KEYS[key];
  if (!action) return;
  event.preventDefault();
  matrix.hover = null;
  action();
}

// An element with `data-change` changes the state so when it is clicked; one with `data-press` is like that key.
function onClick({ target }) {
  const element = target.closest("[data-change], [data-press]");
  if (element?.dataset.press) KEYS[element.dataset.press]();
  else if (element) change(JSON.parse(element.dataset.change));
  else onExperiment(target);
}

function onInput({ target: { type, name, value, checked } }) {
  if (type === "checkbox") return change({ [name]: checked });
  if (name === "own") return change({ text: OWN, own: value.slice(0, 4000), query: Infinity, key: -1, pinned: false });
  if (name === "text") return change({ text: Number(value), query: -1, key: -1, pinned: false });
  return change({ [name]: name === "step" ? Number(value) : value });
}

function onHoverText({ target, pointerType }) {
  const position = textPanel.spans.indexOf(target.closest(".tok"));
  if (position < 0 || pointerType === "touch") return;
  if (!state.pinned) change({ query: position, key: -1 }, false);
  else if (position <= state.query) change({ key: position }, false);
}

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  document.addEventListener("input", onInput);
  window.addEventListener("hashchange", () => location.hash !== stateToHash() && change(stateFromHash(location.hash)));
  // What is typed takes the place of the page's example, but not of what was typed before.
  byId("own").addEventListener("focus", ({ target }) => setTimeout(() => target.value === page.own && target.select()));
  byId("text").addEventListener("pointerover", onHoverText);
  byId("matrix").addEventListener("pointermove", (event) => hoverMatrix(cellAt(event)));
  byId("matrix").addEventListener("pointerleave", () => hoverMatrix(null));
  byId("matrix").addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) change({ query: cell[0], key: cell[1] <= cell[0] ? cell[1] : -1, pinned: true });
  });
  byId("timeline").addEventListener("click", ({ offsetX, currentTarget }) => {
    const at = (offsetX / currentTarget.clientWidth) * 400; // in the picture
    change({ step: nearest(range(run.steps.length), (k) => Math.abs(timeline.x(stepNumber(k)) - at)) });
  });
  new IntersectionObserver((entries) => {
    walkthroughVisible = entries.at(-1).isIntersecting;
    if (isLoaded()) drawWalkthrough();
  }, { rootMargin: "200px" }).observe(byId("walkthrough-section"));
  new ResizeObserver(([{ contentRect: { width } }]) => isLoaded() && width > 0 && drawMatrix()).observe(byId("matrix"));
}

// A button for a finding: it selects the head, and a text on which the score is measured.
function findingButton(finding) {
  const { head: [layer, head], score, title, attention, text, query } = finding;
  const selected = { layer, head, score, key: -1 };
  const step = text === null ? -1 : nearestStep(0, run.steps.length - 1, text);
  if (step >= 0) Object.assign(selected, { text, query: query ?? storedText(0, step, text).length - 1 });
  const name = create("strong", {}, headName(layer, head));
  const value = create("span", { class: "number" }, ` ${fixed(attention)}`);
  const kind = finding.supported ? "supported" : null;
  const attributes = { class: kind, title: finding.summary, "data-change": JSON.stringify(selected) };
  return createButton(attributes, name, ` ${title}`, value);
}

function fillPage() {
  const steps = run.steps.length === 1 ? `step ${stepNumber(0)}` : `${run.steps.length} steps`;
  byId("title").textContent = page.title;
  byId("shape").textContent = `${run.layers} layers × ${run.heads} heads, ${steps}`;
  byId("headline").textContent = page.headline;
  byId("findings").replaceChildren(...page.findings.map(findingButton));
  byId("notes").textContent = page.notes.join(" ");
  const options = (id, entries) => byId(id).append(...entries.map(([value, name]) => new Option(name, value)));
  options("text-choice", [...page.texts.entries()].filter(([k]) => nearestStep(0, 0, k) >= 0));
  options("score", Object.entries(page.scores).map(([name, { title }]) => [name, title]));
  const otherRun = secondRun ? [["run", secondRun.label]] : [];
  options("compare", [["", "nothing"], ...otherRun, ...run.steps.map(({ step }) => [step, `step ${step}`])]);
  byId("second-run").textContent = secondRun ? `dashed: ${secondRun.label}` : "";
  byId("step").max = run.steps.length - 1;
  byId("step").disabled = run.steps.length < 2;
}

async function start() {
  fillPage();
  listen();
  await change(stateFromHash(location.hash || (page.hash ?? "")));
  root.dataset.ready = true;
}

start().catch((error) => {
  showMessage(typeof Float16Array === "undefined"
    ? "This browser is too old for the page; it needs Chrome 135, Firefox 129, Safari 18.2 or newer."
    : `The page could not be drawn: ${error.message}`);
  throw error;
});
