// Pieces that several drawings use. Data becomes text nodes and attributes alone, never markup.

const find = (id) => document.getElementById(id);
const root = document.documentElement;

// An element with attributes and children; texts become text nodes.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children);
  return element;
}

// A token's own direction of writing must not turn what stands around it.
const tokenLabel = (token, most = 18) => make("bdi", { class: "token" }, label(token, most));

// A colour of the theme, as the browser resolves it now.
function themeColour(name) {
  const probe = find("probe");
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

// A bar that says a share without words.
function shareBar(share, colour) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
  bar.firstChild.style.width = `${100 * Math.min(1, Math.abs(share))}%`;
  if (colour) bar.firstChild.style.background = colour;
  return bar;
}

// A canvas of the size that CSS gives it, in the screen's own pixels: [context, width, height].
function sharpCanvas(canvas) {
  const scale = window.devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return [context, width, height];
}

const fixed = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits = 2) => (value > 0 ? `+${fixed(value, digits)}` : fixed(value, digits));

// A number of any size in a few characters.
function short(value) {
  if (!Number.isFinite(value)) return value === -Infinity ? "−∞" : "–";
  const size = Math.abs(value);
  return size !== 0 && (size >= 10000 || size < 0.0005) ? value.toExponential(1).replace("-", "−") : fixed(value, 3);
}

// An interval [value, low, high] or {value, low, high}, or null.
function interval(cell) {
  if (!cell) return null;
  const [value, low, high] = Array.isArray(cell) ? cell : [cell.value, cell.low, cell.high];
  return [value, low, high].every(Number.isFinite) ? { value, low, high } : null;
}

function intervalParts(cell) {
  if (!cell) return ["–"];
  const range = make("span", { class: "range" }, `${fixed(cell.low)} to ${fixed(cell.high)}`);
  return [make("b", {}, signed(cell.value)), " ", range];
}

// Hatching for what the mask removes, so that it is not taken for a weight of 0.
function hatch(context) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const pen = tile.getContext("2d");
  pen.strokeStyle = themeColour("hatch");
  pen.lineWidth = 1;
  pen.beginPath();
  for (const x of [-3, 3]) {
    pen.moveTo(x, 6);
    pen.lineTo(x + 6, 0);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}
