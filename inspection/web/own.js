// Your own text as one more text of the page: what the model computes on it at the chosen step, with and without what is
// switched off. `state.own` is the text, `state.off` what is switched off.

const pristine = root.outerHTML; // the page before anything is drawn
const OWN = page.model ? page.texts.push("your own text") - 1 : -1;
const backend = page.model && (page.model.snapshots ? engineBackend : serverBackend)(page.model);
const written = { text: null, ids: [] }; // a text that was continued token by token: its ids may not be those of `encode`

const namesOff = () => state.off.split(",").filter(Boolean);
const switchedOff = () => Object.fromEntries(namesOff().map((name) => [name, state.mode]));
const ownIds = async () => (written.text === state.own ? written.ids : backend.encode(state.own));

// The tokens that the model gets: those at the end of the text that fit into its context, after what texts begin with.
async function ownTokens() {
  const ids = [...page.model.prefix, ...await ownIds()];
  const atLeastOne = ids.length ? ids : [...await backend.encode("\n"), 0].slice(0, 1); // as an empty prompt of sample.py
  return atLeastOne.slice(-page.model.config.context);
}

// The own text as `loadText` returns a stored one; and the logits and the logit lens at the query, `before` anything was off.
async function loadOwn(step, layer) {
  const ids = await ownTokens();
  const query = state.query < 0 ? ids.length - 1 : Math.min(state.query, ids.length - 1);
  const off = state.off ? switchedOff() : null;
  const request = { step: stepNumber(step), ids, query, layer, off, norms: state.value_weighted };
  const computed = await backend.run(request);
  const before = state.off ? await backend.run({ ...request, off: null, layer: -1 }) : null;
  const tokens = Uint32Array.from(ids);
  return { ...computed, run: 0, step, text: OWN, layer, T: ids.length, first: 0, tokens, before, shown: query };
}
