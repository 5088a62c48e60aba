// Colour scales. Attention weights: cividis (Nunez, Anderton & Renslow 2018), readable with colour-blindness.
// Differences: blue for less, white for equal, orange for more.

// Control points of cividis; linear interpolation between them is within 2 of 255 levels of the original.
const CIVIDIS = [
  [0, "00224d"], [20, "003070"], [23, "003171"], [28, "11356f"], [45, "2e416c"], [66, "454f6b"], [88, "595f6d"],
  [128, "7c7b78"], [145, "8c8878"], [161, "9c9476"], [202, "c6b567"], [221, "dac65a"], [235, "ead34c"],
  [251, "fde234"], [255, "fde737"],
].map(([at, hex]) => [at / 255, hex.match(/../g).map((pair) => parseInt(pair, 16))]);
const [LESS, EQUAL, MORE, NOT_A_NUMBER] = [[33, 96, 172], [247, 247, 247], [214, 96, 16], [200, 0, 120]];

const mix = (from, to, t) => from.map((value, k) => Math.round(value + (to[k] - value) * t));

// The colour of a value from 0 to 1, as [red, green, blue].
function sequentialColour(value) {
  if (Number.isNaN(value)) return NOT_A_NUMBER;
  const t = clamp(value, 0, 1);
  const k = Math.max(1, CIVIDIS.findIndex(([at]) => at >= t));
  const [[low, from], [high, to]] = [CIVIDIS[k - 1], CIVIDIS[k]];
  return mix(from, to, (t - low) / (high - low));
}

// The colour of a difference from -1 to 1.
function divergingColour(value) {
  if (Number.isNaN(value)) return NOT_A_NUMBER;
  return mix(EQUAL, value < 0 ? LESS : MORE, Math.min(1, Math.abs(value)));
}

const css = (colour) => `rgb(${colour})`; // a fourth number is the alpha

// Black or white, whichever has more contrast on a colour (relative luminance, WCAG 2.2).
function textColourOn(colour) {
  const [r, g, b] = colour.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// A colour scale as a CSS background.
function gradient(colourOf, low) {
  const stops = range(17).map((k) => css(colourOf(low + ((1 - low) * k) / 16)));
  return `linear-gradient(to right, ${stops.join(", ")})`;
}
