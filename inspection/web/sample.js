// The text, token by token, and beside it what the chosen token reads. One element for each token is made once; moving
// through the text changes the style of those alone that read or are read differently.

const textView = { drawn: null, spans: [], lit: new Set(), query: -1 };

// A token as it stands in the text: spaces and line breaks are there, and quietly marked.
function tokenSpan(token, k) {
  const span = make("span", { class: "tok", role: "option", id: `token-${k}`, "aria-selected": "false" });
  for (const part of about.words[token]) {
    const text = part.slice(1);
    if (part[0] === "s") span.append(make("span", { class: "space" }, " "));
    else if (part[0] === "n") span.append(make("span", { class: "quiet" }, text), "\n");
    else span.append(part[0] === "x" ? make("span", { class: "quiet" }, text) : text);
  }
  return span;
}

function buildText() {
  const { tokens } = scene.side;
  textView.spans = Array.from(tokens, tokenSpan);
  textView.lit.clear();
  textView.query = -1;
  textView.drawn = tokens;
  fill(find("text"), ...textView.spans);
}

// How strongly a token is marked; the mark is translucent, so that the token stays readable.
function light(span, value, named) {
  const colour = differs() ? (value < 0 ? LESS : MORE) : [255, 205, 40];
  const alpha = Math.min(1, Math.abs(value));
  span.style.background = css(colour, Math.max(alpha, 0.04).toFixed(3));
  span.style.color = alpha > 0.45 ? (differs() ? "#fff" : "#111") : "";
  if (named) span.dataset.share = `${inWords(value, 0)}`.replace(" points", "");
}

function dim(span) {
  span.style.background = "";
  span.style.color = "";
  delete span.dataset.share;
}

function drawText() {
  if (textView.drawn !== scene.side.tokens) buildText();
  const row = shownRow(state.query);
  const named = new Set();
  for (const j of strongest(row, 3)) {
    if (Math.abs(row[j]) >= 0.05 && !named.has(j - 1) && !named.has(j + 1)) named.add(j); // side by side they would overlap
  }
  for (const j of textView.lit) dim(textView.spans[j]);
  textView.lit.clear();
  row.forEach((value, j) => {
    if (Math.abs(value) < 0.01) return;
    light(textView.spans[j], value, named.has(j));
    textView.lit.add(j);
  });
  const before = textView.spans[textView.query];
  if (before) {
    before.classList.remove("query");
    before.setAttribute("aria-selected", "false");
  }
  const span = textView.spans[state.query];
  span.classList.add("query");
  span.setAttribute("aria-selected", "true");
  textView.query = state.query;
  find("text").setAttribute("aria-activedescendant", span.id);
  find("text").classList.toggle("pinned", state.pinned);
}

// Brings the chosen token into sight inside its own box, without moving the page.
function scrollToQuery() {
  const box = find("text");
  const span = textView.spans[state.query];
  const top = span.offsetTop - box.offsetTop;
  if (top < box.scrollTop + 12) box.scrollTop = top - 24;
  else if (top + span.offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = top + span.offsetHeight - box.clientHeight + 12;
  }
}

function readingRow(tokens, row, j) {
  const colour = differs() ? css(row[j] < 0 ? LESS : MORE) : null;
  const number = make("span", { class: "number" }, inWords(row[j]).replace(" points", ""));
  const cells = [tokenLabel(tokens[j]), shareBar(row[j], colour), number];
  return make("li", { "data-key": j, "data-value": row[j] }, ...cells);
}

function likelyRows() {
  const { top, chance, likely, tokens, T } = scene.side;
  const at = state.query * likely;
  const next = state.query + 1 < T ? tokens[state.query + 1] : -1;
  return Array.from({ length: likely }, (_, n) => {
    const came = top[at + n] === next;
    const mark = came ? make("span", { class: "came", title: "this came" }, " ✓") : "";
    const name = make("span", {}, tokenLabel(top[at + n]), mark);
    const p = chance[at + n];
    const number = make("span", { class: "number" }, `${(100 * p).toFixed(1)}\u00a0%`);
    return make("li", { "data-value": p }, name, shareBar(p), number);
  });
}

// The side box: the token, what it reads, how surprising it was, and what the model expects after it.
function drawToken() {
  const { tokens, loss, first } = scene.side;
  const i = state.query;
  const row = shownRow(i);
  const lost = loss[i];
  fill(find("token-name"), tokenLabel(tokens[i], 30));
  const cost = Number.isNaN(lost) ? "nothing came before it" : `loss ${lost.toFixed(2)} nats`;
  find("token-place").textContent = `token ${first + i}, ${cost}${state.pinned ? ", pinned" : ""}`;
  find("token-name").dataset.loss = lost;
  const worth = strongest(row, 5).filter((j, n) => n === 0 || !(Math.abs(row[j]) < 0.0005));
  const readings = worth.map((j) => readingRow(tokens, row, j));
  const none = make("li", { class: "absent" }, differs() ? "no difference" : "nothing");
  fill(find("readings"), ...(readings.length ? readings : [none]));
  find("reads-title").textContent = differs() ? "reads more or less, points" : state.weigh ? "takes from" : "reads";
  const rows = likelyRows();
  fill(find("likely"), ...(rows.length ? rows : [make("li", { class: "absent" }, "not kept in this file")]));
}

// The token above (-1) or below (+1) the chosen one, as the lines fall now.
function tokenOnLine(direction) {
  const here = textView.spans[state.query];
  let [best, nearest] = [state.query, Infinity];
  textView.spans.forEach((span, k) => {
    const down = (span.offsetTop - here.offsetTop) * direction;
    if (down <= 4) return;
    const far = down * 10 + Math.abs(span.offsetLeft - here.offsetLeft);
    if (far < nearest) [nearest, best] = [far, k];
  });
  return best;
}
