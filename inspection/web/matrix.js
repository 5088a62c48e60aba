// The attention pattern of one head as a matrix: a canvas with one pixel per cell, scaled up by CSS, and an SVG with
// axes, frames and the causal mask on top. Both go into the download.

const MARGIN = { left: 76, top: 6 }; // below as on the left, on the right as at the top
const LABEL_HEIGHT = 11;
const matrix = { painted: "", layout: null, hover: null }; // hover: [query, key] under the pointer, or null

// One pixel per cell; where there are more cells than pixels on the screen, the browser averages them.
function paintCells({ T, side }) {
  const image = new ImageData(T, T);
  for (const i of range(T)) {
    shownRow(i).forEach((value, j) => image.data.set([...valueColour(value), 255], 4 * (i * T + j)));
  }
  const canvas = byId("matrix-cells");
  canvas.width = canvas.height = T;
  canvas.style.imageRendering = T > side ? "auto" : "pixelated";
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The staircase of the cells above the diagonal, which the causal mask removes.
function maskPath({ left, top, cell, side, T }) {
  const steps = range(T - 1).reverse().map((i) => `H${left + (i + 1) * cell}V${top + i * cell}`);
  return `M${left + side} ${top + side - cell}${steps.join("")}H${left + side}Z`;
}

// The positions with room for a label: every n-th, and the selected one instead of its neighbours.
function labelledPositions({ cell, T }, selected) {
  const every = Math.ceil(LABEL_HEIGHT / cell);
  const far = (k) => k % every === 0 && Math.abs(k - selected) * cell >= LABEL_HEIGHT;
  return [...range(T).filter(far), selected];
}

// Labels of more than 9 letters are condensed.
function axisLabels(layout, query, key) {
  const { left, top, cell, side, size } = layout;
  const label = (x, y, angle, anchor, text, selected = false) => createSvg("text", {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) rotate(${angle})`, "text-anchor": anchor,
    "dominant-baseline": "central", class: selected ? "axis selected" : "axis", "font-weight": selected ? 600 : null,
    textLength: anchor === "end" && text.length > 9 ? 56 : null, lengthAdjust: "spacingAndGlyphs",
  }, text);
  const name = (k) => tokenText(view.tokens[k], 15);
  const rows = labelledPositions(layout, query);
  const columns = labelledPositions(layout, key);
  return [
    ...rows.map((i) => label(left - 5, top + (i + 0.5) * cell, 0, "end", name(i), i === query)),
    ...columns.map((j) => label(left + (j + 0.5) * cell, top + side + 5, -90, "end", name(j), j === key)),
    label(left + side / 2, size - 7, 0, "middle", "key (column)"),
    label(7, top + side / 2, -90, "middle", "query (row)"),
  ];
}

// A frame around cells of row i, from column j, with a halo that sets it off from any colour.
function frame({ left, top, cell }, i, j, columns, name = "frame") {
  const [x, y] = [left + j * cell - 2, top + i * cell - 2];
  const box = { x, y, width: columns * cell + 4, height: cell + 4, fill: "none" };
  return [
    createSvg("rect", { ...box, class: "halo", stroke: "#fff", "stroke-width": 4 }),
    createSvg("rect", { ...box, class: name, stroke: "#1f5fae", "stroke-width": 1.8 }),
  ];
}

// Everything but the cells, as SVG elements. Colours are attributes for downloads; the page's CSS overrides them.
function matrixOverlay(layout, hover) {
  const { left, top, side } = layout;
  const [query, key, mask] = [state.query, selectedKey(), maskPath(layout)];
  const hatch = createSvg("path", { d: "M0 6L6 0", stroke: "#bbb", class: "hatch" });
  const pattern = createSvg("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" }, hatch);
  return [
    createSvg("defs", {}, pattern),
    createSvg("path", { d: mask, fill: "#fff", class: "paper" }),
    createSvg("path", { d: mask, fill: "url(#hatch)" }),
    createSvg("rect", { x: left, y: top, width: side, height: side, fill: "none", stroke: "#dcdfe3", class: "border" }),
    ...frame(layout, query, 0, query + 1),
    ...frame(layout, query, key, 1),
    ...(hover ? frame(layout, ...hover, 1, "frame hover") : []),
    ...axisLabels(layout, query, key),
  ];
}

function drawMatrix() {
  const { clientWidth: size } = byId("matrix");
  const side = size - MARGIN.left - MARGIN.top;
  const layout = { ...MARGIN, size, side, cell: side / view.T, T: view.T };
  const painted = [view.key, view.step, state.head, state.value_weighted, layout.side].join(" ");
  if (matrix.painted !== painted) {
    paintCells(layout);
    matrix.hover = null;
  }
  Object.assign(matrix, { painted, layout });
  fill(byId("matrix-overlay"), { viewBox: `0 0 ${layout.size} ${layout.size}` });
  byId("matrix-overlay").replaceChildren(...matrixOverlay(layout, matrix.hover));
  drawMatrixReadout();
  const low = comparing() ? -1 : 0;
  byId("scale").style.background = gradient(valueColour, low);
  byId("scale-low").textContent = fixed(low, 0);
  const kind = state.value_weighted ? "value-weighted attention" : "attention";
  byId("scale-name").textContent = comparing() ? "difference" : kind;
}

function drawMatrixReadout() {
  const [i, j] = matrix.hover || [state.query, selectedKey()];
  const name = (k) => create("span", {}, tokenLabel(view.tokens[k]), create("small", {}, ` ${view.first + k}`));
  const text = j > i ? "masked (the key is later than the query)" : percent(shownRow(i)[j], 2);
  byId("matrix-readout").replaceChildren("query ", name(i), ", key ", name(j), ": ", create("strong", {}, text));
}

// The [query, key] under the pointer, or null.
function cellAt(event) {
  const { left, top, cell, T } = matrix.layout;
  const box = byId("matrix").getBoundingClientRect();
  const i = Math.floor((event.clientY - box.top - top) / cell);
  const j = Math.floor((event.clientX - box.left - left) / cell);
  return i >= 0 && i < T && j >= 0 && j < T ? [i, j] : null;
}

function hoverMatrix(cell) {
  if (!isLoaded() || String(cell) === String(matrix.hover)) return;
  matrix.hover = cell;
  drawMatrix();
}

// Downloads the matrix as it is shown, in the colours of the light theme.
function downloadMatrix() {
  const { left: x, top: y, side, size } = matrix.layout;
  const href = byId("matrix-cells").toDataURL();
  const cells = createSvg("image", { href, x, y, width: side, height: side, "image-rendering": "pixelated" });
  const font = { "font-family": "system-ui, sans-serif", "font-size": 10.5 };
  const svg = createSvg("svg", { width: size, height: size, ...font }, cells, ...matrixOverlay(matrix.layout, null));
  const name = `${headName(state.layer, state.head)}-${stepNumber(view.step)}-${page.texts[view.text]}`;
  download(`${name.replace(/[^\w-]+/g, "-")}.svg`, "image/svg+xml", new XMLSerializer().serializeToString(svg));
}
