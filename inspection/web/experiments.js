// What you can do with your own text: switch heads and MLPs off, find the head that matters most, compare two tokens, let
// the model write on, save the page.

const pins = []; // at most two tokens, whose logits are compared
let writing = false;

const toOwn = () => (state.text === OWN ? {} : { text: OWN, query: Infinity, key: -1 });
const mlpName = (layer) => `L${layer} MLP`;
const nextFrame = () => new Promise((resolve) => { setTimeout(resolve); });

// Switches a head or MLP off, or on again.
function toggle(name) {
  const others = namesOff().filter((other) => other !== name);
  const off = others.length < namesOff().length ? others : [...others, name];
  return change({ off: off.join(","), ...toOwn() });
}

function drawExperiments() {
  byId("experiments").hidden = byId("own").hidden = !page.model;
  if (!page.model) return;
  const isOwn = state.text === OWN;
  const label = (name) => `Switch ${name} ${isOwn && namesOff().includes(name) ? "on" : "off"}`;
  byId("toggle-head").textContent = label(headName(state.layer, state.head));
  byId("toggle-mlp").textContent = label(mlpName(state.layer));
  byId("toggle-mlp").hidden = !page.model.config.has_mlp;
  byId("off-list").textContent = isOwn && state.off ? `off: ${namesOff().join(", ")}` : "";
  byId("all-on").hidden = !(isOwn && state.off);
  byId("write-on").textContent = writing ? "Stop" : "Write on";
  byId("lens-box").hidden = !isOwn;
  byId("ranking").hidden = !isOwn || byId("ranking").dataset.key !== rankingKey();
  byId("difference").hidden = !isOwn || pins.length < 2;
  if (!isOwn) return;
  drawLens();
  if (pins.length === 2) drawDifference();
}

// The likely next tokens of the own text, and how likely they were before something was switched off.
function ownPredictionRows() {
  const [now, before] = [view, view.before].map((each) => each && probabilities(each.logits));
  const tokens = new Set([...likely(now, 5), ...(before ? [largest(before)] : [])]);
  return Array.from(tokens, (token) => {
    const write = createButton({ class: "plain", "data-write": token, title: "continue with this token" }, tokenLabel(token));
    const pin = createButton({ class: "plain pin", "data-pin": token, "aria-pressed": pins.includes(token),
      title: "compare two tokens", "aria-label": `compare ${spokenToken(token)}` }, "⚲");
    const attributes = { "data-token": token, "data-value": now[token], class: before ? "changed" : null };
    const row = tokenRow(create("span", {}, write, pin), now[token], percentOf(now[token]), attributes);
    if (before) {
      const kind = Math.abs(now[token] - before[token]) < 0.0005 ? null : now[token] < before[token] ? "falls" : "rises";
      row.append(create("span", { class: `number ${kind ?? ""}` }, `was ${percentOf(before[token])}`));
    }
    return row;
  });
}

// The logit difference of the two pinned tokens after the query.
function drawDifference() {
  const difference = ({ logits }) => signed(logits[pins[0]] - logits[pins[1]]);
  byId("difference").replaceChildren("logit difference of ", tokenLabel(pins[0]), " and ", tokenLabel(pins[1]), ": ",
    create("strong", {}, difference(view)), view.before ? `, was ${difference(view.before)}` : "");
}

// The token that the residual stream predicts before each layer and after the last (nostalgebraist 2020).
function drawLens() {
  byId("lens").replaceChildren(...Array.from(view.lens, (token, stage) => {
    const before = view.before?.lens[stage] ?? token;
    const was = before === token ? [] : [create("small", {}, " was "), tokenLabel(before)];
    const name = stage ? `after L${stage - 1} ` : "embedding ";
    return create("li", { "data-token": token }, create("span", { class: "muted" }, name), tokenLabel(token), ...was);
  }));
}

const rankingKey = () => [state.own, state.step, state.query].join(" ");

// Zero-ablates each head alone, and sorts them by how much less likely that makes the most likely next token.
async function rankHeads() {
  if (state.text !== OWN) await change(toOwn());
  const [key, step, ids] = [rankingKey(), stepNumber(view.step), (await ownTokens()).slice(0, state.query + 1)];
  const logP = async (off) => {
    const { logits } = await backend.run({ step, ids, query: state.query, layer: -1, off });
    return probabilities(logits).map(Math.log);
  };
  const [whole, falls] = [await logP(null), []];
  const target = largest(whole);
  for (const { layer, head } of allHeads) {
    falls.push({ layer, head, fall: whole[target] - (await logP({ [headName(layer, head)]: "zero" }))[target] });
    byId("rank-heads").textContent = `${falls.length} of ${allHeads.length} heads`;
    if (allHeads.length > 16) await nextFrame();
    if (key !== rankingKey()) break; // the text has changed meanwhile
  }
  byId("rank-heads").textContent = "Which head matters most here?";
  falls.sort((a, b) => b.fall - a.fall);
  const buttons = falls.slice(0, 6).map(({ layer, head, fall }) =>
    createButton({ "data-change": JSON.stringify({ layer, head, key: -1 }) }, `${headName(layer, head)} ${signed(-fall)}`));
  byId("ranking").replaceChildren("log p of ", tokenLabel(target), " without each head alone, in nats, here: ", ...buttons);
  byId("ranking").dataset.key = key;
  drawExperiments();
}

// A number from 0 to 1 for each seed (mulberry32).
function random(seed) {
  let t = (seed + 0x6D2B79F5) | 0;
  t = Math.imul(t ^ (t >>> 15), t | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
}

// The next token: the most likely one at temperature 0, else drawn from the `topK` most likely ones, or for 0 from all.
function sampleToken(logits, { temperature, topK, seed }) {
  if (temperature === 0) return largest(logits);
  const order = topK ? likely(logits, topK) : Array.from(logits.keys());
  let left = random(seed);
  const at = probabilities(order.map((token) => logits[token] / temperature)).findIndex((p) => (left -= p) < 0);
  return order[Math.max(0, at)];
}

// Appends a token to the own text.
async function append(token) {
  const ids = [...await ownIds(), token];
  Object.assign(written, { ids, text: await backend.decode(ids) });
  return change({ text: OWN, own: written.text, query: Infinity, key: -1 });
}

// Continues the own text token by token, until end-of-text, a full context, or the button is pressed again.
async function writeOn() {
  writing = !writing;
  if (!writing) return;
  await change({ text: OWN, query: Infinity, key: -1 });
  const number = (id) => Math.max(0, Number(byId(id).value) || 0);
  while (writing && view.T < page.model.config.context) {
    const options = { temperature: number("temperature"), topK: number("top-k"), seed: 1000 * number("seed") + view.T };
    const token = sampleToken(view.logits, options);
    if (token === page.model.end_of_text) break;
    await append(token);
    await nextFrame();
  }
  writing = false;
  drawExperiments();
}

// Downloads the page with what is shown now as what it shows first.
function savePage() {
  const data = JSON.stringify({ ...JSON.parse(byId("page-data").textContent), hash: stateToHash() });
  const safe = data.replace(/[<>&]/g, (c) => `\\u00${c.charCodeAt(0).toString(16)}`);
  const html = pristine.replace(/(id="page-data">)[^]*?(<\/script>)/, (_, open, close) => open + safe + close);
  download("attention.html", "text/html", `<!DOCTYPE html>\n${html}`);
}

function togglePin(token) {
  if (pins.includes(token)) pins.splice(pins.indexOf(token), 1);
  else if (pins.push(token) > 2) pins.shift();
  drawQuery();
  drawExperiments();
}

const EXPERIMENTS = {
  "rank-heads": rankHeads,
  "write-on": writeOn,
  "save-page": savePage,
};

function onExperiment(target) {
  const button = target.closest("button");
  if (!button) return;
  (EXPERIMENTS[button.id] ?? LESSON_BUTTONS[button.id])?.();
  if (button.dataset.write) append(Number(button.dataset.write));
  if (button.dataset.pin) togglePin(Number(button.dataset.pin));
}
