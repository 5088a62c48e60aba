// The attention matrix as a file: an SVG with a square per cell, or a PNG made of that SVG.

const PICTURE = { side: 760, title: 54, scale: 640 }; // CSS pixels; `scale` is where the colour scale begins

function pictureTitle() {
  const other = state.compare === "run" ? secondRun.label : `step ${state.compare}`;
  const shown = `step ${stepNumber(view.step)}${comparing() ? ` minus ${other}` : ""}`;
  return `${headName(state.layer, state.head)}, ${shown}: ${page.texts[view.text]}`.slice(0, 85);
}

function scaleElements() {
  const low = comparing() ? -1 : 0;
  const text = (x, anchor, content) => createSvg("text", { x, y: -14, "text-anchor": anchor }, content);
  const colours = range(32).map((k) => createSvg("rect", {
    x: PICTURE.scale + 3 * k, y: -22, width: 3.5, height: 9, fill: css(valueColour(low + ((1 - low) * k) / 31)),
  }));
  const name = text(PICTURE.scale - 6, "end", `${scaleName()}  ${fixed(low, 0)}`);
  return [name, ...colours, text(PICTURE.scale + 104, "start", "1")];
}

// A background in the colour of 0, and a path for the cells of every other colour.
function cellElements({ left, top, side, cell, T }) {
  const zero = css(valueColour(0));
  const paths = {}; // by colour
  const size = cell.toFixed(3);
  for (const i of range(T)) {
    shownRow(i).forEach((value, j) => {
      const fill = css(valueColour(value));
      const corner = `${(left + j * cell).toFixed(2)} ${(top + i * cell).toFixed(2)}`;
      if (fill !== zero) paths[fill] = `${paths[fill] ?? ""}M${corner}h${size}v${size}h-${size}z`;
    });
  }
  const shape = { "shape-rendering": "crispEdges" };
  const cells = Object.entries(paths).map(([fill, d]) => createSvg("path", { d, fill, ...shape }));
  return [createSvg("rect", { x: left, y: top, width: side, height: side, fill: zero }), ...cells];
}

function matrixSvg() {
  const { side, title } = PICTURE;
  const layout = matrixLayout(side, view.T);
  const size = { width: side, height: side + title };
  const font = { "font-family": "system-ui, sans-serif", "font-size": 10.5 };
  const heading = { x: 12, y: -34, "font-size": 15, "font-weight": 600 };
  const svg = createSvg("svg", { viewBox: `0 ${-title} ${side} ${side + title}`, ...size, ...font },
    createSvg("rect", { y: -title, ...size, fill: "#fff" }), createSvg("text", heading, pictureTitle()),
    ...scaleElements(), ...cellElements(layout), ...matrixOverlay(layout, null));
  return new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" });
}

function save(blob, extension) {
  const name = `${headName(state.layer, state.head)}-${stepNumber(view.step)}-${page.texts[view.text]}`;
  const href = URL.createObjectURL(blob);
  create("a", { download: `${name.replace(/[^\w-]+/g, "-")}.${extension}`, href }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

async function downloadPng() {
  const image = new Image();
  image.src = URL.createObjectURL(matrixSvg());
  await image.decode();
  const canvas = create("canvas", { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  canvas.toBlob((blob) => save(blob, "png"));
}
