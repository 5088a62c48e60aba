// The text, token by token, with the keys that the selected query attends to highlighted; and details of that query.

const textPanel = { tokens: null, spans: [], highlighted: [] };

// A token as in the text, with spaces and line breaks faintly marked.
function tokenSpan(token, position) {
  const span = create("span", { class: "tok", role: "option", id: `token-${position}`, "aria-selected": "false" });
  for (const piece of page.vocabulary[token]) {
    const [kind, text] = [piece[0], piece.slice(1)];
    if (kind === "s") span.append(create("span", { class: "space" }, " "));
    else if (kind === "t") span.append(text);
    else span.append(create("span", { class: "escaped" }, text), kind === "n" ? "\n" : "");
  }
  return span;
}

function highlight(span, value, labelled) {
  const colour = comparing() ? (value < 0 ? LESS : MORE) : [255, 205, 40];
  const alpha = Math.min(1, Math.abs(value));
  span.style.background = css(colour, Math.max(alpha, 0.04).toFixed(3)); // translucent: the token stays readable
  span.style.color = alpha > 0.45 ? (comparing() ? "#fff" : "#111") : "";
  if (labelled) span.dataset.percent = percent(value, 0).replace(" points", "");
}

function clearHighlight(span) {
  span.style.background = span.style.color = "";
  delete span.dataset.percent;
}

function drawText() {
  if (textPanel.tokens !== view.tokens) {
    const spans = Array.from(view.tokens, tokenSpan);
    Object.assign(textPanel, { tokens: view.tokens, spans, highlighted: [] });
    byId("text").replaceChildren(...spans);
  }
  const row = shownRow(state.query);
  const labelled = new Set(); // not on neighbours, where labels would overlap
  for (const j of topKeys(row, 3)) {
    if (Math.abs(row[j]) >= 0.05 && !labelled.has(j - 1) && !labelled.has(j + 1)) labelled.add(j);
  }
  for (const j of textPanel.highlighted) clearHighlight(textPanel.spans[j]);
  textPanel.highlighted = Array.from(row.keys()).filter((j) => !(Math.abs(row[j]) < 0.01));
  for (const j of textPanel.highlighted) highlight(textPanel.spans[j], row[j], labelled.has(j));
  const selected = byId("text").querySelector(".query");
  selected?.classList.remove("query");
  selected?.setAttribute("aria-selected", "false");
  const span = textPanel.spans[state.query];
  span.classList.add("query");
  span.setAttribute("aria-selected", "true");
  byId("text").setAttribute("aria-activedescendant", span.id);
  byId("text").classList.toggle("pinned", state.pinned);
}

// Scrolls the text box, not the page, until the query is visible.
function scrollToQuery() {
  const box = byId("text");
  const span = textPanel.spans[state.query];
  const top = span.offsetTop - 12;
  const bottom = span.offsetTop + span.offsetHeight + 12;
  if (top < box.scrollTop) box.scrollTop = top - 12;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

// A row of a list: a token, a bar and a percentage.
function tokenRow(name, value, text, attributes = {}, colour = "") {
  const bar = create("span");
  bar.style.width = `${100 * Math.min(1, Math.abs(value))}%`;
  bar.style.background = colour;
  const track = create("span", { class: "bar", "aria-hidden": "true" }, bar);
  return create("li", attributes, name, track, create("span", { class: "number" }, text));
}

function attentionRows() {
  const row = shownRow(state.query);
  const keys = topKeys(row, 5).filter((j, n) => n === 0 || Math.abs(row[j]) >= 0.0005);
  return keys.map((j) => {
    const colour = comparing() ? css(row[j] < 0 ? LESS : MORE) : "";
    const text = percent(row[j]).replace(" points", "");
    return tokenRow(tokenLabel(view.tokens[j]), row[j], text, { "data-key": j, "data-value": row[j] }, colour);
  });
}

function predictionRows() {
  const { topTokens, topProbs, topK, tokens } = view;
  return range(topK).map((n) => {
    const k = state.query * topK + n;
    const actual = topTokens[k] === tokens[state.query + 1];
    const mark = actual ? create("span", { class: "actual", title: "the actual next token" }, " ✓") : "";
    const name = create("span", {}, tokenLabel(topTokens[k]), mark);
    return tokenRow(name, topProbs[k], `${(100 * topProbs[k]).toFixed(1)} %`);
  });
}

function drawQuery() {
  const i = state.query;
  const loss = Number.isNaN(view.loss[i]) ? "no loss, for it is the first" : `loss ${view.loss[i].toFixed(2)} nats`;
  byId("query-token").replaceChildren(tokenLabel(view.tokens[i], 30));
  byId("query-details").textContent = `position ${view.first + i}, ${loss}${state.pinned ? ", pinned" : ""}`;
  const title = state.value_weighted ? "attends to (value-weighted)" : "attends to";
  byId("attends-to-title").textContent = comparing() ? "difference, in points" : title;
  const absent = (text) => [create("li", { class: "absent" }, text)];
  const [rows, predictions] = [attentionRows(), predictionRows()];
  byId("attends-to").replaceChildren(...(rows.length ? rows : absent(comparing() ? "no difference" : "nothing")));
  byId("predictions").replaceChildren(...(predictions.length ? predictions : absent("not stored in this file")));
}

// The nearest token in the line above (-1) or below (+1).
function tokenInLine(direction) {
  const query = textPanel.spans[state.query];
  let [best, smallest] = [state.query, Infinity];
  textPanel.spans.forEach((span, k) => {
    const down = (span.offsetTop - query.offsetTop) * direction;
    const distance = down * 10 + Math.abs(span.offsetLeft - query.offsetLeft);
    if (down > 4 && distance < smallest) [smallest, best] = [distance, k];
  });
  return best;
}
