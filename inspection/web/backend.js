// Who runs the model: the engine in this page, or the server that sent it (`attend.py serve`). Both have
//   steps: the training steps whose weights there are
//   encode(text), decode(ids): token ids of a text, and back
//   run({ step, ids, off, layer, query, norms }): what the model computes on the tokens. `off` names heads and MLPs that are
//     switched off, such as { L1H3: "zero", "L0 MLP": "mean" }. Always `logits` (V) after the query, and `lens`: the most likely
//     token there from the residual stream before each layer and after the last. With a layer >= 0 also that layer's `pattern`,
//     `queries`, `keys`, `values`, `attn_out`, if `norms` is true `value_norms` (H, T), and `loss` (T), at least that of the
//     query, as `_text` in page_builder.py has them.

function engineBackend({ config, vocab_size, tokenizer, snapshots }) {
  const [encode, bytesOf] = createTokenizer(tokenizer);
  const decoder = new TextDecoder();
  const weightsAt = (step) => snapshots.find((snapshot) => snapshot.step === step).weights;
  const models = {}; // promises, by step
  return {
    steps: snapshots.map(({ step }) => step),
    encode,
    decode: (ids) => decoder.decode(Uint8Array.from(ids.flatMap((id) => Array.from(bytesOf(id))))),
    async run({ step, ids, off, layer, query, norms }) {
      const model = await (models[step] ??= decodeModel(config, vocab_size, weightsAt(step)));
      const cache = runModel(model, off === null ? model.whole : model.ablated, ids, off ?? {});
      const logitsAt = (x, t) => unembed(model, rowAt(x, config.d_model, t));
      const stages = cache.stream.map((x) => logitsAt(x, query));
      const result = { logits: stages.at(-1), lens: stages.map(largest) };
      if (layer < 0) return result;
      const loss = new Float32Array(ids.length).fill(NaN);
      if (query > 0) loss[query] = -Math.log(probabilities(logitsAt(cache.stream.at(-1), query - 1))[ids[query]]);
      return { ...result, loss, ...layerArrays(model, cache, layer, norms) };
    },
  };
}

function serverBackend({ steps }) {
  const post = async (name, body) => {
    const response = await fetch(name, { method: "POST", body: JSON.stringify(body) });
    if (!response.ok) throw new Error(await response.text());
    return response.json();
  };
  return {
    steps,
    encode: (text) => post("encode", { text }),
    decode: (ids) => post("decode", { ids }),
    run: async (request) => decodeAll(await post("run", request)),
  };
}

const largest = (values) => values.reduce((best, value, k) => (value > values[best] ? k : best), 0);

// The model, with a cache for the whole of it, and one for it with something switched off.
async function decodeModel(config, vocab_size, encoded) {
  const [arrays, weights] = [await decodeAll(encoded), {}];
  for (const [name, values] of Object.entries(arrays)) {
    const scale = arrays[`${name}.scale`];
    const K = scale && values.length / scale.length;
    weights[name] = scale ? Float32Array.from(values, (value, k) => value * scale[Math.floor(k / K)]) : values;
  }
  return { config, vocab_size, weights, whole: createCache(config), ablated: createCache(config) };
}

// What the page shows of one layer.
function layerArrays({ config, weights }, cache, layer, norms) {
  const { n_heads: H, n_kv_heads: G, d_head: D, d_model: C } = config;
  const [T, kept] = [cache.tokens.length, cache.layers[layer]];
  const byHead = (values, heads) => { // (T, heads, D) to (H, T, D), shared heads repeated
    const result = new Float32Array(H * T * D);
    range(H * T).forEach((row) => {
      const [h, t] = [Math.floor(row / T), row % T];
      result.set(rowAt(values, D, t * heads + Math.floor((h * heads) / H)), row * D);
    });
    return result;
  };
  const cells = (T * (T + 1)) / 2;
  const [pattern, values] = [new Float32Array(H * cells), byHead(kept.values, G)];
  kept.patterns.forEach((rows, h) => pattern.set(rows.subarray(0, cells), h * cells));
  return {
    pattern, values, queries: byHead(kept.queries, H), keys: byHead(kept.keys, G), attn_out: kept.attention.slice(0, T * C),
    ...(norms ? { value_norms: valueNorms(values, weights[`blocks.${layer}.attention.out.weight`], config, T) } : {}),
  };
}

// |v_j W_O| of each head, (H, T) (Kobayashi et al. 2020, section 3).
function valueNorms(values, W_O, { n_heads: H, d_head: D, d_model: C }, T) {
  return Float32Array.from(range(H * T), (row) => {
    const h = Math.floor(row / T);
    const total = range(C).reduce((squares, c) => squares + dotAt(W_O, (c * H + h) * D, values, row * D, D) ** 2, 0);
    return Math.sqrt(total);
  });
}

// The indices of the largest of some values, the largest first.
const likely = (values, count) => Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, count);
