// The numbers of the page, as inspection/page_encoding.py wrote them: a JSON table, and blocks of numbers that are
// decompressed when they are needed.

const page = JSON.parse(byId("page-data").textContent);
const run = page.runs[0];
const secondRun = page.runs[1] || null;

// Float16 values by their bits: sign, 5 bits of exponent, 10 of fraction (IEEE 754).
const FLOAT16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits & 32768 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
});

const DECODERS = {
  float32: [4, (buffer) => new Float32Array(buffer)],
  uint32: [4, (buffer) => new Uint32Array(buffer)],
  float16: [2, (buffer) => Float32Array.from(new Uint16Array(buffer), (bits) => FLOAT16[bits])],
  sqrt8: [1, (buffer) => Float32Array.from(new Uint8Array(buffer), (root) => (root / 255) ** 2)],
};

// The arrays of a block; `layout` lists the dtype and length of each.
async function readBlock(id, layout) {
  const bytes = Uint8Array.from(atob(byId(`block-${id}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  let offset = 0;
  const arrays = layout.map(([dtype, length]) => {
    const [size, decode] = DECODERS[dtype];
    return decode(buffer.slice(offset, (offset += size * length)));
  });
  if (offset !== buffer.byteLength) throw new Error("a data block of this page is damaged");
  return arrays;
}

const CACHED_BLOCKS = 32;
const cache = new Map(); // block id -> promise, least recently used first

function cachedBlock(id, layout) {
  const block = cache.get(id) || readBlock(id, layout);
  cache.delete(id);
  cache.set(id, block);
  if (cache.size > CACHED_BLOCKS) cache.delete(cache.keys().next().value);
  return block;
}

// What the page holds of a text at a step, or null.
const storedText = (run, step, text) => page.runs[run].steps[step].texts[text];

// The index of the stored step nearest to the given one at which the run has this text; -1 if it never has.
function nearestStep(run, step, text) {
  const stored = range(page.runs[run].steps.length).filter((k) => storedText(run, k, text));
  return stored.reduce((best, k) => (best < 0 || Math.abs(k - step) <= Math.abs(best - step) ? k : best), -1);
}

// Token ids (T), loss in nats (T, nan for the first), relative value norms (L H T), top next tokens (T N).
async function loadTokens(run, step, text) {
  const { block, tokens: T, first, top_k: topK } = storedText(run, step, text);
  const { layers, heads } = page.runs[run];
  const dtypes = ["uint32", "float32", "float16", "uint32", "float16"];
  const lengths = [T, T, layers * heads * T, T * topK, T * topK];
  const arrays = await cachedBlock(block, dtypes.map((dtype, k) => [dtype, lengths[k]]));
  const [tokens, loss, valueNorms, topTokens, topProbs] = arrays;
  return { T, first, tokens, loss, valueNorms, topK, topTokens, topProbs };
}

// The attention patterns of one layer: for each head the lower triangle, row by row.
async function loadPattern(run, step, text, layer) {
  const { tokens: T, layers, dtype } = storedText(run, step, text);
  const [pattern] = await cachedBlock(layers[layer], [[dtype, (page.runs[run].heads * T * (T + 1)) / 2]]);
  return pattern;
}

// Queries, keys, values (H T D) and attention output (T C) of one layer of the first run; null if not stored.
async function loadQkv(step, text, layer) {
  const { tokens: T, qkv } = storedText(0, step, text);
  if (!qkv) return null;
  const { blocks, d_head: D, d_model: C, dtype } = qkv;
  const lengths = [run.heads * T * D, run.heads * T * D, run.heads * T * D, T * C];
  const [queries, keys, values, output] = await cachedBlock(blocks[layer], lengths.map((length) => [dtype, length]));
  return { queries, keys, values, output, D, C };
}

// A token in one line: a space as a dot, a line break as an arrow, undecodable bytes as \xNN.
function tokenText(token, length = Infinity) {
  const letters = Array.from(page.vocabulary[token].map((piece) => piece.slice(1)).join(""));
  return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : letters.join("");
}

// The same for a screen reader: without the dot for a space.
function spokenToken(token) {
  const text = page.vocabulary[token].map((piece) => (piece === "s·" ? " " : piece.slice(1))).join("");
  return text.trim() || tokenText(token);
}

const headName = (layer, head) => `L${layer}H${head}`;
