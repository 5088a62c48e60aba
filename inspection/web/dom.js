// Helpers for elements and numbers. Data becomes text nodes and attributes, never markup.

const byId = (id) => document.getElementById(id);
const root = document.documentElement;

function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  return element;
}

// An element with attributes and children; strings become text nodes.
function create(tag, attributes = {}, ...children) {
  const element = setAttributes(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

function createSvg(tag, attributes = {}, ...children) {
  const element = setAttributes(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  element.append(...children);
  return element;
}

const range = (count) => Array.from({ length: count }, (_, k) => k);
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

// <bdi> keeps a right-to-left token from reordering the text around it.
const tokenLabel = (token, length = 18) => create("bdi", { class: "token" }, tokenText(token, length));

// A fixed number of digits, with a minus sign and without "-0.00".
function fixed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  const text = value.toFixed(digits);
  return text.replace("-", Number(text) === 0 ? "" : "−");
}

const signed = (value, digits = 2) => (value > 0 ? `+${fixed(value, digits)}` : fixed(value, digits));

// A number of any size in a few characters.
function compact(value) {
  if (!Number.isFinite(value)) return value === -Infinity ? "−∞" : "–";
  const size = Math.abs(value);
  return size !== 0 && (size >= 10000 || size < 0.0005) ? value.toExponential(1).replace("-", "−") : fixed(value, 3);
}
