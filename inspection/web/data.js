// The numbers. What page.py packed is found here by run, step, text and layer, and unpacked when it is asked for.
// Everything else stands on this file: data -> state (what is looked at) -> scene (its numbers) -> drawings.

const about = JSON.parse(document.getElementById("about").textContent);

// Half-precision numbers by their 16 bits: sign, 5 bits of exponent, 10 of fraction (IEEE 754).
const HALVES = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let value = (1 + fraction / 1024) * 2 ** (exponent - 15);
    if (exponent === 0) value = fraction * 2 ** -24;
    if (exponent === 31) value = fraction ? NaN : Infinity;
    table[bits] = bits & 32768 ? -value : value;
  }
  return table;
})();

const SIZES = { half: 2, float: 4, index: 4, eight: 1 };

// The arrays of one block, in the order in which they were written. Each lies there as byte planes.
class Block {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  // The next `count` numbers: "half" and "eight" (bits of a square root) become Float32Array, like "float".
  take(kind, count) {
    const size = SIZES[kind];
    const planes = this.bytes.subarray(this.at, this.at + size * count);
    if (planes.length !== size * count) throw new Error("a block of this page is damaged");
    this.at += size * count;
    const out = new Float32Array(kind === "index" ? 0 : count);
    if (kind === "half") {
      for (let i = 0; i < count; i++) out[i] = HALVES[planes[i] | (planes[count + i] << 8)];
      return out;
    }
    if (kind === "eight") {
      for (let i = 0; i < count; i++) out[i] = (planes[i] / 255) ** 2;
      return out;
    }
    const whole = new Uint8Array(4 * count);
    for (let b = 0; b < 4; b++) for (let i = 0; i < count; i++) whole[4 * i + b] = planes[b * count + i];
    return kind === "float" ? new Float32Array(whole.buffer) : new Uint32Array(whole.buffer);
  }
}

async function unpack(id) {
  const text = atob(document.getElementById(`block-${id}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Block(new Uint8Array(await new Response(stream).arrayBuffer()));
}

// What was unpacked last stays at hand, up to so many numbers.
const MOST_NUMBERS = 4e7;
const memory = new Map();

function remembered(id, numbers, make) {
  const known = memory.get(id);
  memory.delete(id);
  memory.set(id, known || { numbers, made: make() });
  let total = 0;
  for (const entry of memory.values()) total += entry.numbers;
  for (const [oldest, entry] of memory) {
    if (total <= MOST_NUMBERS || oldest === id) break;
    memory.delete(oldest);
    total -= entry.numbers;
  }
  return memory.get(id).made;
}

// What the page holds of a text at a step, or null.
function textAt(run, step, text) {
  return about.runs[run].steps[step].texts[text];
}

// The kept step of a text that is nearest to the one asked for; -1 if the run has none.
function nearestStep(run, step, text) {
  let best = -1;
  about.runs[run].steps.forEach((entry, k) => {
    if (entry.texts[text] && (best < 0 || Math.abs(k - step) <= Math.abs(best - step))) best = k;
  });
  return best;
}

// Tokens, loss (nats, the first has none), lengths of values by head, and the likeliest next tokens.
function loadSide(run, step, text) {
  const entry = textAt(run, step, text);
  const { layers, heads } = about.runs[run];
  const T = entry.tokens;
  return remembered(entry.side, T * (layers * heads + 12), async () => {
    const block = await unpack(entry.side);
    return {
      T,
      first: entry.first,
      tokens: block.take("index", T),
      loss: block.take("float", T),
      norms: block.take("half", layers * heads * T),
      likely: entry.likely,
      top: block.take("index", T * entry.likely),
      chance: block.take("half", T * entry.likely),
    };
  });
}

// The weights of one layer: head after head, each a lower triangle row by row.
function loadLayer(run, step, text, layer) {
  const entry = textAt(run, step, text);
  const numbers = (about.runs[run].heads * entry.tokens * (entry.tokens + 1)) / 2;
  const id = entry.layers[layer];
  return remembered(id, numbers, async () => (await unpack(id)).take(entry.eight ? "eight" : "half", numbers));
}

// Queries, keys, values (H T D) and what the layer adds to the residual stream (T C), or null where not kept.
function loadDetails(run, step, text, layer) {
  const entry = textAt(run, step, text);
  if (!entry.details) return Promise.resolve(null);
  const { blocks, width, stream, half } = entry.details;
  const each = about.runs[run].heads * entry.tokens * width;
  const kind = half ? "half" : "float";
  return remembered(blocks[layer], 3 * each + entry.tokens * stream, async () => {
    const block = await unpack(blocks[layer]);
    const [queries, keys, values] = [0, 1, 2].map(() => block.take(kind, each));
    return { queries, keys, values, projected: block.take(kind, entry.tokens * stream), width, stream, half };
  });
}

// A token in one line, safe to show: a space as a dot, a line break as an arrow, bytes that are no text as \xNN.
function label(token, most = Infinity) {
  const text = about.words[token].map((part) => part.slice(1)).join("");
  const letters = Array.from(text);
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : text;
}

// The same without the marks around it, as one would say it.
function spoken(token) {
  const text = about.words[token].map((part) => (part === "s·" ? " " : part.slice(1))).join("");
  return text.trim() || label(token);
}

function headName(layer, head) {
  return `L${layer}H${head}`;
}
