// Helpers for elements and numbers. Data becomes text nodes and attributes, never markup.

const root = document.documentElement;
const byId = (id) => document.getElementById(id);

// Sets attributes, except those that are null, and appends children; strings become text nodes.
function fill(element, attributes = {}, ...children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const create = (tag, ...content) => fill(document.createElement(tag), ...content);
const createSvg = (tag, ...content) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), ...content);

const createButton = (attributes, ...content) => create("button", { type: "button", ...attributes }, ...content);

// Downloads a file with this content.
function download(name, type, content) {
  create("a", { download: name, href: URL.createObjectURL(new Blob([content], { type })) }).click();
}

// A bar of which a share is coloured.
function shareBar(share, colour) {
  const bar = create("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", Math.min(1, Math.abs(share)));
  bar.style.setProperty("--colour", colour);
  return bar;
}

const range = (count) => Array.from({ length: count }, (_, k) => k);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const sum = (values) => values.reduce((total, value) => total + value, 0);

// The item at the smallest distance, the last of several; undefined if there are none.
const nearest = (items, distance) =>
  items.reduce((best, item) => (distance(item) <= distance(best) ? item : best), items[0]);

// <bdi> keeps a right-to-left token from reordering the text around it.
const tokenLabel = (token, length = 18) => create("bdi", { class: "token" }, tokenText(token, length));
const headName = (layer, head) => `L${layer}H${head}`;

// A fixed number of digits, with a minus sign and without "-0.00".
function fixed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  const text = value.toFixed(digits);
  return text.replace("-", Number(text) === 0 ? "" : "−");
}

const percentOf = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + fixed(value, digits);

// A number of any size in a few characters.
function compact(value) {
  const size = Math.abs(value);
  return size >= 10000 || (size > 0 && size < 0.0005) ? value.toExponential(1).replace("-", "−") : fixed(value, 3);
}
