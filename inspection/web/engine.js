// The forward pass of the model, one function an operation, in the order and with the names of model/functional.py and
// model/gpt.py. An array of T rows of C numbers is a Float32Array with x[t * C + c].
// Shapes: T new positions, S all positions so far, C model width, H heads, G key/value heads, D head size, V vocabulary.

// functional.py

// x Wᵀ + b, (T, K) -> (T, N), with W (N, K) as in nn.Linear: four rows of x times two of W at once, the last ones repeated.
function linear(x, { weight, bias }, N) {
  const K = weight.length / N;
  const last = x.length / K - 1;
  const y = new Float32Array((last + 1) * N);
  for (let t = 0; t <= last; t += 4) {
    const [t1, t2, t3] = [Math.min(t + 1, last), Math.min(t + 2, last), Math.min(t + 3, last)];
    for (let n = 0; n < N; n += 2) multiplyRows(x, t, t1, t2, t3, weight, n, Math.min(n + 1, N - 1), K, N, y);
  }
  return bias ? mapRows(y, N, (row) => add(row, bias)) : y;
}

// Columns n and m of rows t0 to t3 of y = x Wᵀ: faster together, since each number is loaded once for several products.
function multiplyRows(x, t0, t1, t2, t3, W, n, m, K, N, y) {
  const x0 = t0 * K, x1 = t1 * K, x2 = t2 * K, x3 = t3 * K, wn = n * K, wm = m * K;
  let n0 = 0, n1 = 0, n2 = 0, n3 = 0, m0 = 0, m1 = 0, m2 = 0, m3 = 0;
  for (let k = 0; k < K; k++) {
    const a = x[x0 + k], b = x[x1 + k], c = x[x2 + k], d = x[x3 + k], v = W[wn + k], w = W[wm + k];
    n0 += a * v;
    n1 += b * v;
    n2 += c * v;
    n3 += d * v;
    m0 += a * w;
    m1 += b * w;
    m2 += c * w;
    m3 += d * w;
  }
  y[t0 * N + n] = n0;
  y[t1 * N + n] = n1;
  y[t2 * N + n] = n2;
  y[t3 * N + n] = n3;
  y[t0 * N + m] = m0;
  y[t1 * N + m] = m1;
  y[t2 * N + m] = m2;
  y[t3 * N + m] = m3;
}

// The dot product of `length` numbers of a and b, in four sums, which is faster than in one.
function dotAt(a, i, b, j, length) {
  let [s0, s1, s2, s3] = [0, 0, 0, 0];
  const even = length & ~3;
  for (let k = 0; k < even; k += 4) {
    s0 += a[i + k] * b[j + k];
    s1 += a[i + k + 1] * b[j + k + 1];
    s2 += a[i + k + 2] * b[j + k + 2];
    s3 += a[i + k + 3] * b[j + k + 3];
  }
  for (let k = even; k < length; k++) s0 += a[i + k] * b[j + k];
  return s0 + s1 + s2 + s3;
}

// Layer normalization of each row (Ba et al. 2016, equation 4).
function layerNorm(x, { weight, bias }, eps) {
  return mapRows(x, weight.length, (row) => {
    const mean = sum(row) / row.length;
    const centred = row.map((value) => value - mean);
    const scale = 1 / Math.sqrt(dotAt(centred, 0, centred, 0, row.length) / row.length + eps);
    return centred.map((value, c) => value * scale * weight[c] + (bias ? bias[c] : 0));
  });
}

// Root mean square normalization of each row (Zhang & Sennrich 2019, equation 4).
function rmsNorm(x, { weight }, eps) {
  return mapRows(x, weight.length, (row) => {
    const scale = 1 / Math.sqrt(dotAt(row, 0, row, 0, row.length) / row.length + eps);
    return row.map((value, c) => value * scale * weight[c]);
  });
}

// f of each row of C numbers, which gives `width` numbers.
function mapRows(x, C, f, width = C) {
  const T = x.length / C;
  const y = new Float32Array(T * width);
  for (let t = 0; t < T; t++) y.set(f(rowAt(x, C, t), t), t * width);
  return y;
}

const rowAt = (x, C, t) => x.subarray(t * C, (t + 1) * C);

// The cosines and sines (T, D) of the rotary angles, position * theta^(-2i/D), of T positions from `start` on.
function precomputeRope(start, T, D, theta) {
  const angles = Float64Array.from(range(T * D), (k) => (start + Math.floor(k / D)) * theta ** ((-2 * (k % (D / 2))) / D));
  return { cos: angles.map(Math.cos), sin: angles.map(Math.sin) };
}

// Rotate each pair (x_i, x_{i + D/2}) of each head by its angle (Su et al. 2021, equation 15).
function applyRope(x, heads, D, { cos, sin }) {
  const half = D / 2;
  return mapRows(x, D, (row, n) => {
    const at = Math.floor(n / heads) * D;
    return row.map((value, c) => value * cos[at + c] + (c < half ? -row[c + half] : row[c - half]) * sin[at + c]);
  });
}

// softmax(qKᵀ / √D) of the query at `position` (Vaswani et al. 2017, equation 1): q[qAt ...] and the keys of one head, which start
// at kAt and are kStride apart.
function attentionPattern(q, qAt, keys, kAt, kStride, D, position) {
  const scores = new Float64Array(position + 1); // the mask: there are no scores for later keys
  for (let j = 0; j <= position; j++) scores[j] = dotAt(q, qAt, keys, kAt + j * kStride, D) / Math.sqrt(D);
  return softmax(scores);
}

function softmax(scores) {
  let [max, total] = [-Infinity, 0];
  for (const score of scores) max = Math.max(max, score);
  const result = new Float64Array(scores.length);
  for (let k = 0; k < scores.length; k++) total += result[k] = Math.exp(scores[k] - max);
  for (let k = 0; k < scores.length; k++) result[k] /= total;
  return result;
}

const probabilities = (logits) => softmax(Float64Array.from(logits));

const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const relu2 = (x) => (x > 0 ? x * x : 0);
const silu = (x) => x / (1 + Math.exp(-x));
const ACTIVATIONS = { gelu, relu2 }; // besides SwiGLU

// SiLU of one half of each row times the other half (Shazeer 2020, equation 6).
const swiglu = (x, F) => mapRows(x, 2 * F, (row) => row.subarray(0, F).map((value, k) => silu(value) * row[F + k]), F);

// gpt.py

const modules = (weights, name) => ({ weight: weights[`${name}.weight`], bias: weights[`${name}.bias`] });

function norm(config, weights, name, x) {
  if (config.norm === "none") return x;
  return (config.norm === "rms" ? rmsNorm : layerNorm)(x, modules(weights, name), config.norm_eps);
}

// Queries, keys and values of each head, with QK norm and rotary embeddings where the preset has them.
function project(config, weights, name, x, rope) {
  const { n_heads: H, n_kv_heads: G, d_head: D } = config;
  const N = (H + 2 * G) * D;
  const qkv = linear(x, modules(weights, `${name}.qkv`), N);
  const columns = (from, to) => mapRows(qkv, N, (row) => row.subarray(from * D, to * D), (to - from) * D); // of heads
  let [q, k] = [columns(0, H), columns(H, H + G)];
  if (config.qk_norm) {
    q = rmsNorm(q, modules(weights, `${name}.q_norm`), config.norm_eps);
    k = rmsNorm(k, modules(weights, `${name}.k_norm`), config.norm_eps);
  }
  if (rope) [q, k] = [applyRope(q, H, D, rope), applyRope(k, G, D, rope)];
  return [q, k, columns(H + G, H + 2 * G)];
}

// Multi-head attention in five steps, of the new positions over all so far: 1 project to queries, keys and values; 2 score every
// query against every key; 3 scale; 4 mask and softmax; 5 the weighted sum of the values. Returns the heads' outputs (T, H D)
// before they are projected. The cache of the layer keeps queries, keys, values and each head's pattern, row by row.
function attention(config, weights, layer, x, rope, start, cache) {
  const { n_heads: H, n_kv_heads: G, d_head: D } = config;
  const [q, k, v] = project(config, weights, `blocks.${layer}.attention`, x, rope); // 1
  const T = q.length / (H * D);
  cache.queries.set(q, start * H * D);
  cache.keys.set(k, start * G * D);
  cache.values.set(v, start * G * D);
  const z = new Float32Array(T * H * D);
  const { values } = cache;
  for (let t = 0; t < T; t++) {
    for (let h = 0; h < H; h++) {
      const [position, group] = [start + t, Math.floor((h * G) / H) * D];
      const row = attentionPattern(q, (t * H + h) * D, cache.keys, group, G * D, D, position); // 2, 3, 4
      cache.patterns[h].set(row, (position * (position + 1)) / 2);
      const out = (t * H + h) * D;
      for (let j = 0; j <= position; j++) { // 5
        for (let d = 0, at = j * G * D + group; d < D; d++) z[out + d] += row[j] * values[at + d];
      }
    }
  }
  return z;
}

function mlp(config, weights, layer, x) {
  const name = `blocks.${layer}.mlp`;
  const gated = config.activation === "swiglu";
  const [C, F] = [config.d_model, config.d_mlp];
  const hidden = linear(x, modules(weights, `${name}.up`), gated ? 2 * F : F);
  const active = gated ? swiglu(hidden, F) : hidden.map(ACTIVATIONS[config.activation]);
  return linear(active, modules(weights, `${name}.down`), C);
}

// Replaces the outputs z (T, H D) of the heads that are off by 0, or by their means (H D).
function ablate(z, layer, { n_heads: H, d_head: D }, off, means) {
  for (let h = 0; h < H; h++) {
    const mode = off[headName(layer, h)];
    if (!mode) continue;
    const mean = mode === "mean" ? rowAt(means, D, h) : new Float32Array(D);
    for (let at = h * D; at < z.length; at += H * D) z.set(mean, at);
  }
}

const add = (a, b) => a.map((value, k) => value + b[k]);

const NGRAM_MULTIPLIER = 1_000_003; // of the hash

// The embedding (C) of the token at position t: its own, that of the position, and those of the n-grams that end there.
function embed({ config, weights, vocab_size: V }, tokens, t) {
  const C = config.d_model;
  let x = rowAt(weights["token_embedding.weight"], C, tokens[t]);
  const positions = weights["position_embedding.weight"];
  if (positions) x = add(x, rowAt(positions, C, t));
  let row = tokens[t];
  for (let n = 2; n <= config.ngrams; n++) {
    const earlier = tokens[t - n + 1] ?? V;
    row = (row * NGRAM_MULTIPLIER + earlier) % config.ngram_rows;
    x = add(x, rowAt(weights[`ngram_embedding.tables.${n - 2}.weight`], C, row));
  }
  return x;
}

// The residual stream before each layer and after the last, (L + 1) arrays (T, C), of the tokens from `start` on; what is
// before them is in the cache. `off` names heads and MLPs that are switched off, such as { L1H3: "zero", "L0 MLP": "mean" }.
function residualStream(model, tokens, start, cache, off) {
  const { config, weights } = model;
  const C = config.d_model;
  const T = tokens.length - start;
  let x = new Float32Array(T * C);
  range(T).forEach((t) => x.set(embed(model, tokens, start + t), t * C));
  const stream = [x];
  const rope = config.positions === "rotary" && precomputeRope(start, T, config.d_head, config.rope_theta);
  range(config.n_layers).forEach((layer) => {
    const block = `blocks.${layer}`;
    const z = attention(config, weights, layer, norm(config, weights, `${block}.norm1`, x), rope, start, cache.layers[layer]);
    ablate(z, layer, config, off, rowAt(weights["means.heads"], config.n_heads * config.d_head, layer));
    const attended = linear(z, modules(weights, `${block}.attention.out`), C);
    cache.layers[layer].attention.set(attended, start * C);
    x = add(x, attended);
    if (config.has_mlp) {
      const mode = off[`L${layer} MLP`];
      if (!mode) x = add(x, mlp(config, weights, layer, norm(config, weights, `${block}.norm2`, x)));
      else if (mode === "mean") x = x.map((value, k) => value + weights["means.mlps"][layer * C + (k % C)]);
    }
    stream.push(x);
  });
  return stream;
}

// The logits (T, V) of rows of the residual stream.
function unembed({ config, weights, vocab_size: V }, x) {
  const head = weights["lm_head.weight"] ?? weights["token_embedding.weight"];
  return linear(norm(config, weights, "final_norm", x), { weight: head }, V);
}

function createCache({ n_layers: L, n_heads: H, n_kv_heads: G, d_head: D, d_model: C, context }) {
  const layers = range(L).map(() => ({
    queries: new Float32Array(context * H * D),
    keys: new Float32Array(context * G * D),
    values: new Float32Array(context * G * D),
    attention: new Float32Array(context * C), // what attention adds to the residual stream
    patterns: range(H).map(() => new Float32Array((context * (context + 1)) / 2)), // A[i, j] at i (i + 1) / 2 + j
  }));
  const stream = range(L + 1).map(() => new Float32Array(context * C)); // the residual stream before each layer, and at the end
  return { tokens: [], off: "{}", layers, stream };
}

// Brings the cache to these tokens and this `off`: positions that are the same as before are kept. `unembed` turns its residual
// stream into logits.
function runModel(model, cache, tokens, off = {}) {
  if (JSON.stringify(off) !== cache.off) Object.assign(cache, { off: JSON.stringify(off), tokens: [] });
  let start = 0;
  while (start < tokens.length && tokens[start] === cache.tokens[start]) start++;
  if (start < tokens.length) {
    const stream = residualStream(model, tokens, start, cache, off);
    stream.forEach((x, layer) => cache.stream[layer].set(x, start * model.config.d_model));
  }
  cache.tokens = Array.from(tokens);
  return cache;
}
