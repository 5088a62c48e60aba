// One head as a square of colours: the query (row) reads the key (column). What the mask removes is hatched.
// The weights are painted once into an image of one pixel for each cell; moving through them only frames cells anew.

const MARGIN = { left: 76, bottom: 76, top: 6, right: 6 };
const LABEL_HEIGHT = 11;
const matrixView = { name: "", image: null, geometry: null, hover: null };

// Where things are in a picture of this size.
function geometryOf(size, T) {
  const side = size - MARGIN.left - MARGIN.right;
  return { size, side, left: MARGIN.left, top: MARGIN.top, cell: side / T, T };
}

// The image: one pixel for each cell, or, where there are more cells than pixels, the largest of those that fall on one.
function paintImage(T, pixels) {
  const N = Math.min(T, Math.max(1, Math.floor(pixels)));
  const values = new Float32Array(N * N);
  const there = new Uint8Array(N * N);
  for (let i = 0; i < T; i++) {
    const row = shownRow(i);
    const y = Math.floor((i * N) / T) * N;
    for (let j = 0; j <= i; j++) {
      const at = y + Math.floor((j * N) / T);
      if (!there[at] || !(Math.abs(row[j]) <= Math.abs(values[at]))) values[at] = row[j];
      there[at] = 1;
    }
  }
  const image = new ImageData(N, N);
  for (let at = 0; at < N * N; at++) {
    if (there[at]) image.data.set([...numberColour(values[at]), 255], 4 * at);
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = N;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// The path around the cells that the mask removes.
function maskedPath(context, { left, top, cell, side, T }) {
  context.beginPath();
  context.moveTo(left + side, top);
  for (let i = 0; i < T; i++) {
    context.lineTo(left + (i + 1) * cell, top + i * cell);
    context.lineTo(left + (i + 1) * cell, top + (i + 1) * cell);
  }
  context.closePath();
}

// Which tokens have room for their name: every n-th, and the chosen one instead of its neighbours.
function namedTokens({ cell, T }, chosen) {
  const every = Math.max(1, Math.ceil(LABEL_HEIGHT / cell));
  const named = [];
  for (let k = 0; k < T; k += every) if (k !== chosen && Math.abs(k - chosen) * cell >= LABEL_HEIGHT) named.push(k);
  return chosen >= 0 ? [...named, chosen] : named;
}

function drawLabels(context, geometry, query, key) {
  const { left, top, cell, side, size } = geometry;
  const { tokens } = scene.side;
  const [ink, accent] = [themeColour("muted"), themeColour("accent")];
  context.textBaseline = "middle";
  context.textAlign = "right";
  const write = (k, chosen) => {
    context.fillStyle = k === chosen ? accent : ink;
    context.font = `${k === chosen ? "600 " : ""}10.5px ${FONT}`;
    context.fillText(label(tokens[k], 9), 0, 0);
  };
  const place = (x, y, turn, k, chosen) => {
    context.save();
    context.translate(x, y);
    context.rotate(turn);
    write(k, chosen);
    context.restore();
  };
  for (const i of namedTokens(geometry, query)) place(left - 5, top + (i + 0.5) * cell, 0, i, query);
  for (const j of namedTokens(geometry, key)) place(left + (j + 0.5) * cell, top + side + 5, -Math.PI / 2, j, key);
  context.fillStyle = ink;
  context.font = `11px ${FONT}`;
  context.textAlign = "center";
  context.fillText("key (column): what is read", left + side / 2, size - 7);
  context.save();
  context.translate(7, top + side / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("query (row): what reads", 0, 0);
  context.restore();
}

function frameCells(context, { left, top, cell, side }, query, key, hover) {
  const box = (x, y, width, height, colour, line) => {
    for (const [style, wide] of [[themeColour("paper"), line + 2], [colour, line]]) {
      context.strokeStyle = style; // a halo keeps the frame apart from whatever lies below
      context.lineWidth = wide;
      context.strokeRect(x, y, Math.max(width, 2), Math.max(height, 2));
    }
  };
  const accent = themeColour("accent");
  box(left - 2, top + query * cell - 2, (query + 1) * cell + 4, cell + 4, accent, 1.5); // around the cells, not on them
  box(left + key * cell - 2, top + query * cell - 2, cell + 4, cell + 4, accent, 2);
  if (hover) box(left + hover[1] * cell, top + hover[0] * cell, cell, cell, themeColour("ink"), 1.5);
  context.strokeStyle = themeColour("line");
  context.lineWidth = 1;
  context.strokeRect(left + 0.5, top + 0.5, side - 1, side - 1);
}

// The whole picture into any canvas.
function paintMatrix(context, geometry, image, hover) {
  const { left, top, side, size } = geometry;
  context.clearRect(0, 0, size, size);
  context.imageSmoothingEnabled = false;
  context.drawImage(image, left, top, side, side);
  context.save();
  maskedPath(context, geometry);
  context.fillStyle = themeColour("paper");
  context.fill();
  context.fillStyle = hatch(context);
  context.fill();
  context.restore();
  const key = shownKey();
  frameCells(context, geometry, state.query, key, hover);
  drawLabels(context, geometry, state.query, key);
}

function matrixName(pixels) {
  return [scene.name, scene.step, state.head, state.weigh, differs(), state.theme, pixels].join(" ");
}

function drawMatrix() {
  const canvas = find("matrix");
  const [context, width] = sharpCanvas(canvas);
  if (width < MARGIN.left + 40) return;
  const geometry = geometryOf(width, scene.side.T);
  const pixels = Math.round(geometry.side * (window.devicePixelRatio || 1));
  const name = matrixName(pixels);
  if (matrixView.name !== name) {
    Object.assign(matrixView, { name, image: paintImage(geometry.T, pixels), hover: null });
  }
  matrixView.geometry = geometry;
  paintMatrix(context, geometry, matrixView.image, matrixView.hover);
  drawMatrixWords();
}

// The cell under a point of the canvas, [query, key], or null.
function cellAt(event) {
  const { left, top, cell, T } = matrixView.geometry;
  const box = find("matrix").getBoundingClientRect();
  const j = Math.floor((event.clientX - box.left - left) / cell);
  const i = Math.floor((event.clientY - box.top - top) / cell);
  return i >= 0 && i < T && j >= 0 && j < T ? [i, j] : null;
}

// The read-out below the matrix: the cell under the pointer, else the chosen one.
function drawMatrixWords() {
  const [i, j] = matrixView.hover || [state.query, shownKey()];
  const { tokens, first } = scene.side;
  const out = find("matrix-readout");
  const value = j > i ? null : shownRow(i)[j];
  const what = j > i ? "masked: it comes later" : inWords(value, 2);
  const query = make("span", {}, tokenLabel(tokens[i]), make("small", {}, ` ${first + i}`));
  const key = make("span", {}, tokenLabel(tokens[j]), make("small", {}, ` ${first + j}`));
  fill(out, "query ", query, " reads key ", key, ": ", make("strong", {}, what));
  Object.assign(out.dataset, { query: i, key: j, value: value ?? "masked" });
}

const scaleName = () => (differs() ? "difference" : state.weigh ? "value-weighted" : "weight");

function drawLegend() {
  const [low, high] = differs() ? [-1, 1] : [0, 1];
  find("scale").style.background = gradient(differs() ? differenceColour : shareColour, low, high);
  find("scale-low").textContent = fixed(low, 0);
  find("scale-high").textContent = fixed(high, 0);
  find("scale-name").textContent = scaleName();
}

function hoverMatrix(event) {
  const cell = event && cellAt(event);
  if (String(cell) === String(matrixView.hover)) return;
  matrixView.hover = cell;
  drawMatrix();
}
