// The text, token by token, with the keys that the selected query attends to highlighted; and details of that query.

const textPanel = { tokens: null, spans: [] };

// A token as in the text, with spaces and line breaks faintly marked. It stays on one line: the line may end before a
// space, and ends after a line break.
function tokenNodes(token, query) {
  const pieces = page.vocabulary[token].map(([kind, ...letters]) => {
    if (kind === "t") return letters.join("");
    return kind === "s" ? create("span", { class: "space" }, " ") : create("span", { class: "escaped" }, ...letters);
  });
  const selects = JSON.stringify({ query, key: -1, pinned: true });
  const attributes = { class: "tok", role: "option", id: `token-${query}`, "data-change": selects };
  const kinds = page.vocabulary[token].map(([kind]) => kind);
  const breaks = "\n".repeat(kinds.filter((kind) => kind === "n").length);
  return [kinds[0] === "s" ? create("wbr") : "", create("span", attributes, ...pieces), breaks];
}

function drawText() {
  if (textPanel.tokens !== view.tokens) {
    const nodes = Array.from(view.tokens, tokenNodes);
    Object.assign(textPanel, { tokens: view.tokens, spans: nodes.map(([, span]) => span) });
    byId("text").replaceChildren(...nodes.flat());
  }
  const row = shownRow(state.query);
  const labelled = topKeys(row, 3).filter((j, n, keys) => // not next to a larger one, where labels would overlap
    Math.abs(row[j]) >= 0.05 && keys.slice(0, n).every((k) => Math.abs(k - j) > 1));
  textPanel.spans.forEach((span, j) => {
    const value = Math.abs(row[j]) >= 0.01 ? row[j] : 0;
    const alpha = Math.min(1, Math.abs(value)); // translucent: the token stays readable
    const colour = comparing() ? (value < 0 ? LESS : MORE) : [255, 205, 40];
    span.style.background = value ? css([...colour, Math.max(alpha, 0.04).toFixed(3)]) : "";
    span.style.color = alpha > 0.45 ? (comparing() ? "#fff" : "#111") : "";
    span.classList.toggle("query", j === state.query);
    span.ariaSelected = j === state.query;
    if (labelled.includes(j)) span.dataset.percent = percent(value, 0).replace(" points", "");
    else delete span.dataset.percent;
  });
  byId("text").setAttribute("aria-activedescendant", textPanel.spans[state.query].id);
  byId("text").classList.toggle("pinned", state.pinned);
}

// Scrolls the text box, not the page, until the query is visible.
function scrollToQuery() {
  const box = byId("text");
  const { offsetTop: top, offsetHeight: height } = textPanel.spans[state.query];
  box.scrollTop = clamp(box.scrollTop, top + height + 12 - box.clientHeight, top - 24);
}

// A row of a list: a token, a bar and a percentage.
const tokenRow = (name, value, text, attributes = {}, colour = "var(--accent)") =>
  create("li", attributes, name, shareBar(value, colour), create("span", { class: "number" }, text));

function attentionRows() {
  const row = shownRow(state.query);
  const keys = topKeys(row, 5).filter((j, n) => n === 0 || Math.abs(row[j]) >= 0.0005);
  return keys.map((j) => {
    const colour = comparing() ? css(row[j] < 0 ? LESS : MORE) : undefined;
    const text = percent(row[j]).replace(" points", "");
    return tokenRow(tokenLabel(view.tokens[j]), row[j], text, { "data-key": j, "data-value": row[j] }, colour);
  });
}

function predictionRows() {
  const { top_tokens: tokens, top_probs: probs, T } = view;
  const [count, next] = [tokens.length / T, view.tokens[state.query + 1]];
  return range(count).map((n) => {
    const k = state.query * count + n;
    const mark = tokens[k] === next ? create("span", { class: "actual", title: "the actual next token" }, " ✓") : "";
    return tokenRow(create("span", {}, tokenLabel(tokens[k]), mark), probs[k], `${(100 * probs[k]).toFixed(1)} %`);
  });
}

function drawQuery() {
  const i = state.query;
  const loss = Number.isNaN(view.loss[i]) ? "no loss, for it is the first" : `loss ${view.loss[i].toFixed(2)} nats`;
  byId("query-token").replaceChildren(tokenLabel(view.tokens[i], 30));
  byId("query-details").textContent = `position ${view.first + i}, ${loss}${state.pinned ? ", pinned" : ""}`;
  const title = state.value_weighted ? "attends to (value-weighted)" : "attends to";
  byId("attends-to-title").textContent = comparing() ? "difference, in points" : title;
  const rows = attentionRows();
  const absent = create("li", { class: "absent" }, comparing() ? "no difference" : "nothing");
  byId("attends-to").replaceChildren(...(rows.length ? rows : [absent]));
  byId("predictions").replaceChildren(...(state.text === OWN ? ownPredictionRows() : predictionRows()));
}
