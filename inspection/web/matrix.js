// The attention pattern of one head as a matrix: a canvas with one pixel per cell, scaled up by CSS, and an SVG with
// axes, frames and the causal mask on top. The same SVG goes into downloads (download.js).

const MARGIN = { left: 76, bottom: 76, top: 6, right: 6 };
const LABEL_HEIGHT = 11;
const matrix = { painted: "", layout: null, hover: null }; // hover: [query, key] under the pointer, or null

function matrixLayout(size, T) {
  const side = size - MARGIN.left - MARGIN.right;
  return { size, side, left: MARGIN.left, top: MARGIN.top, cell: side / T, T };
}

// One pixel per cell; if there are more cells than pixels, each pixel shows the largest value of its cells.
function paintCells(canvas, T, pixels) {
  const N = Math.min(T, Math.max(1, Math.floor(pixels)));
  const values = new Float32Array(N * N);
  for (let i = 0; i < T; i++) {
    const y = Math.floor((i * N) / T) * N;
    shownRow(i).forEach((value, j) => {
      const k = y + Math.floor((j * N) / T);
      if (!(Math.abs(value) <= Math.abs(values[k]))) values[k] = value;
    });
  }
  const image = new ImageData(N, N);
  values.forEach((value, k) => image.data.set([...valueColour(value), 255], 4 * k));
  canvas.width = canvas.height = N;
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

function axisLabels(layout, query, key) {
  const { left, top, cell, side, size } = layout;
  const label = (x, y, angle, anchor, text, selected = false) => createSvg("text", {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) rotate(${angle})`, "text-anchor": anchor,
    "dominant-baseline": "central", class: selected ? "axis selected" : "axis", "font-weight": selected ? 600 : null,
  }, text);
  const name = (k) => tokenText(view.tokens[k], 9);
  const rows = labelledPositions(layout, query);
  const columns = labelledPositions(layout, key);
  return [
    ...rows.map((i) => label(left - 5, top + (i + 0.5) * cell, 0, "end", name(i), i === query)),
    ...columns.map((j) => label(left + (j + 0.5) * cell, top + side + 5, -90, "end", name(j), j === key)),
    label(left + side / 2, size - 7, 0, "middle", "key (column)"),
    label(7, top + side / 2, -90, "middle", "query (row)"),
  ];
}

// A frame around cells, with a halo that sets it off from any colour.
function frame(x, y, width, height, name) {
  const box = { x, y, width: Math.max(width, 2), height: Math.max(height, 2), fill: "none" };
  return [
    createSvg("rect", { ...box, class: "halo", stroke: "#fff", "stroke-width": 4 }),
    createSvg("rect", { ...box, class: name, stroke: "#1f5fae", "stroke-width": 1.8 }),
  ];
}

// Everything but the cells, as SVG elements. Colours are attributes for downloads; the page's CSS overrides them.
function matrixOverlay(layout, hover) {
  const { left, top, cell, side } = layout;
  const [query, key] = [state.query, selectedKey()];
  const mask = maskPath(layout);
  const hatch = createSvg("path", { d: "M0 6L6 0", stroke: "#bbb", class: "hatch" });
  const pattern = { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" };
  const [x, y] = [left + key * cell, top + query * cell];
  return [
    createSvg("defs", {}, createSvg("pattern", pattern, hatch)),
    createSvg("path", { d: mask, fill: "#fff", class: "paper" }),
    createSvg("path", { d: mask, fill: "url(#hatch)" }),
    createSvg("rect", { x: left, y: top, width: side, height: side, fill: "none", stroke: "#dcdfe3", class: "border" }),
    ...frame(left - 2, y - 2, (query + 1) * cell + 4, cell + 4, "frame"),
    ...frame(x - 2, y - 2, cell + 4, cell + 4, "frame"),
    ...(hover ? frame(left + hover[1] * cell, top + hover[0] * cell, cell, cell, "frame hover") : []),
    ...axisLabels(layout, query, key),
  ];
}

function drawMatrix() {
  const canvas = byId("matrix-cells");
  const layout = matrixLayout(byId("matrix").clientWidth, view.T);
  if (layout.side < 40) return;
  const pixels = layout.side * (window.devicePixelRatio || 1);
  const painted = [view.key, view.step, state.head, state.value_weighted, comparing(), pixels].join(" ");
  if (matrix.painted !== painted) {
    paintCells(canvas, view.T, pixels);
    canvas.style.width = canvas.style.height = `${layout.side}px`;
    matrix.hover = null;
  }
  Object.assign(matrix, { painted, layout });
  const overlay = setAttributes(byId("matrix-overlay"), { viewBox: `0 0 ${layout.size} ${layout.size}` });
  overlay.replaceChildren(...matrixOverlay(layout, matrix.hover));
  drawMatrixReadout();
  drawLegend();
}

// The [query, key] under the pointer, or null.
function cellAt(event) {
  const { left, top, cell, T } = matrix.layout;
  const box = byId("matrix").getBoundingClientRect();
  const i = Math.floor((event.clientY - box.top - top) / cell);
  const j = Math.floor((event.clientX - box.left - left) / cell);
  return i >= 0 && i < T && j >= 0 && j < T ? [i, j] : null;
}

function drawMatrixReadout() {
  const [i, j] = matrix.hover || [state.query, selectedKey()];
  const value = j > i ? null : shownRow(i)[j];
  const name = (k) => create("span", {}, tokenLabel(view.tokens[k]), create("small", {}, ` ${view.first + k}`));
  const text = value === null ? "masked (the key is later than the query)" : percent(value, 2);
  byId("matrix-readout").replaceChildren("query ", name(i), ", key ", name(j), ": ", create("strong", {}, text));
  Object.assign(byId("matrix-readout").dataset, { query: i, key: j, value: value ?? "masked" });
}

const scaleName = () => (comparing() ? "difference" : state.value_weighted ? "value-weighted attention" : "attention");

function drawLegend() {
  const low = comparing() ? -1 : 0;
  byId("scale").style.background = gradient(valueColour, low, 1);
  byId("scale-low").textContent = fixed(low, 0);
  byId("scale-name").textContent = scaleName();
}

function hoverMatrix(cell) {
  if (String(cell) === String(matrix.hover)) return;
  matrix.hover = cell;
  drawMatrix();
}
