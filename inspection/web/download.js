// The matrix as a file: PNG from a canvas, SVG written out cell by cell.

const FONT = "system-ui, sans-serif";
const PICTURE = 760; // CSS pixels of a side, without the title
const SCALE_AT = 540; // where the scale begins, beside the title

function pictureTitle() {
  const weighted = state.weigh ? ", value-weighted" : "";
  const against = differs() ? `, minus ${state.against === "other" ? second.label : `step ${state.against}`}` : "";
  const head = headName(state.layer, state.head);
  return `${head}, step ${stepNumber(scene.step)}${against}${weighted}: ${about.texts[scene.text]}`;
}

// The scale, from left to right: its lower end, its colours and its upper end.
function scaleParts() {
  const [low, steps, each] = [differs() ? -1 : 0, 32, 3];
  const name = `${scaleName()}  ${low}`.replace("-", "−");
  const colours = Array.from({ length: steps }, (_, k) => {
    const colour = css(numberColour(low + ((1 - low) * k) / (steps - 1)));
    return { x: SCALE_AT + 90 + k * each, colour, width: each };
  });
  return [{ x: SCALE_AT, text: name }, ...colours, { x: SCALE_AT + 96 + steps * each, text: "1" }];
}

function save(blob, ending) {
  const name = `${headName(state.layer, state.head)}-${stepNumber(scene.step)}-${about.texts[scene.text]}`;
  const link = make("a", { download: `${name.replace(/[^\w-]+/g, "-")}.${ending}`, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function downloadPng() {
  const canvas = document.createElement("canvas");
  const scale = 2;
  canvas.width = PICTURE * scale;
  canvas.height = (PICTURE + 34) * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.fillStyle = themeColour("paper");
  context.fillRect(0, 0, PICTURE, PICTURE + 34);
  const geometry = geometryOf(PICTURE, scene.side.T);
  const layer = document.createElement("canvas");
  layer.width = layer.height = PICTURE * scale;
  const pen = layer.getContext("2d");
  pen.scale(scale, scale);
  paintMatrix(pen, geometry, paintImage(geometry.T, geometry.side * scale), null);
  context.drawImage(layer, 0, 34, PICTURE, PICTURE);
  context.fillStyle = themeColour("ink");
  context.font = `600 15px ${FONT}`;
  context.textBaseline = "middle";
  context.fillText(pictureTitle(), 12, 18, SCALE_AT - 30);
  context.font = `11px ${FONT}`;
  for (const { x, text, colour, width } of scaleParts()) {
    if (text) context.fillText(text, x, 18);
    else {
      context.fillStyle = colour;
      context.fillRect(x, 13, width + 0.5, 9);
      context.fillStyle = themeColour("ink");
    }
  }
  canvas.toBlob((blob) => save(blob, "png"));
}

// Text of XML: what would be markup is escaped, and what XML forbids is left out.
function xml(text) {
  const named = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  const allowed = Array.from(String(text)).filter((c) => /[\t\n\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/u.test(c));
  return allowed.join("").replace(/[&<>"]/g, (c) => named[c]);
}

function svgCells({ left, top, cell, T }) {
  const zero = css(numberColour(0));
  const points = [`${left},${top}`];
  for (let i = 0; i < T; i++) {
    const x = left + (i + 1) * cell;
    points.push(`${x},${top + i * cell}`, `${x},${top + (i + 1) * cell}`);
  }
  points.push(`${left},${top + T * cell}`);
  const parts = [`<polygon points="${points.join(" ")}" fill="${zero}"/>`];
  for (let i = 0; i < T; i++) {
    shownRow(i).forEach((value, j) => {
      const colour = css(numberColour(value));
      if (colour === zero) return;
      const place = `x="${(left + j * cell).toFixed(2)}" y="${(top + i * cell).toFixed(2)}"`;
      parts.push(`<rect ${place} width="${cell.toFixed(3)}" height="${cell.toFixed(3)}" fill="${colour}"/>`);
    });
  }
  return parts;
}

function svgLabels(geometry) {
  const { left, top, side, cell, size } = geometry;
  const { tokens } = scene.side;
  const key = shownKey();
  const text = (x, y, turn, anchor, words, bold = false) =>
    `<text transform="translate(${x.toFixed(1)} ${y.toFixed(1)}) rotate(${turn})" text-anchor="${anchor}"` +
    ` dominant-baseline="middle" ${bold ? 'font-weight="600"' : ""}>${xml(words)}</text>`;
  const rows = namedTokens(geometry, state.query).map((i) =>
    text(left - 5, top + (i + 0.5) * cell, 0, "end", label(tokens[i], 9), i === state.query));
  const columns = namedTokens(geometry, key).map((j) =>
    text(left + (j + 0.5) * cell, top + side + 5, -90, "end", label(tokens[j], 9), j === key));
  return [
    ...rows,
    ...columns,
    text(left + side / 2, size - 7, 0, "middle", "key (column): what is read"),
    text(7, top + side / 2, -90, "middle", "query (row): what reads"),
  ];
}

function svgText() {
  const geometry = geometryOf(PICTURE, scene.side.T);
  const { left, top, side } = geometry;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -34 ${PICTURE} ${PICTURE + 34}"`,
    ' font-family="sans-serif" font-size="10.5">',
    `<title>${xml(pictureTitle())}</title>`,
    '<defs><pattern id="masked" width="6" height="6" patternUnits="userSpaceOnUse">',
    '<path d="M0 6L6 0" stroke="#bbb"/></pattern></defs>',
    `<rect x="0" y="-34" width="${PICTURE}" height="${PICTURE + 34}" fill="#fff"/>`,
    `<text x="12" y="-14" font-size="15" font-weight="600">${xml(pictureTitle())}</text>`,
    ...scaleParts().map(({ x, text, colour, width }) =>
      text
        ? `<text x="${x}" y="-14">${xml(text)}</text>`
        : `<rect x="${x}" y="-22" width="${width + 0.5}" height="9" fill="${colour}"/>`),
    `<rect x="${left}" y="${top}" width="${side}" height="${side}" fill="url(#masked)"/>`,
    ...svgCells(geometry),
    ...svgLabels(geometry),
    "</svg>",
  ].join("\n");
}

const downloadSvg = () => save(new Blob([svgText()], { type: "image/svg+xml" }), "svg");
