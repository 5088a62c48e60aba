// Text to token ids, as data/tokenizer.py does it, for the tokenizers char, byte and bpe.

// GPT-2's pre-tokens, as GPT2_PATTERN there; JavaScript's \s is another set of characters than \p{White_Space}.
const PRE_TOKENS = new RegExp([
  String.raw`'(?:[sdmt]|ll|ve|re)`, String.raw` ?\p{L}+`, String.raw` ?\p{N}+`, String.raw` ?[^\p{White_Space}\p{L}\p{N}]+`,
  String.raw`\p{White_Space}+$`, String.raw`\p{White_Space}+(?!\P{White_Space})`, String.raw`\p{White_Space}`,
].join("|"), "gu");

// The bytes of a text in UTF-8, each as a character of Latin-1.
const toBytes = (text) => Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte));

// Functions from a text to token ids, and from an id to its bytes; end-of-text has none. A `char` vocabulary leaves out the
// characters that it does not have.
function createTokenizer({ kind, characters, merged }) {
  if (kind === "char") {
    const known = Array.from(characters);
    const ids = new Map(known.map((character, id) => [character, id]));
    const encode = (text) => Array.from(text.toWellFormed(), (character) => ids.get(character));
    return [(text) => encode(text).filter((id) => id !== undefined), (id) => new TextEncoder().encode(known[id] ?? "")];
  }
  const tokens = [...range(256).map((byte) => String.fromCharCode(byte)), ...(merged ?? [])];
  const bytesOf = (id) => Uint8Array.from(tokens[id] ?? "", (character) => character.charCodeAt(0));
  if (kind === "byte") return [(text) => Array.from(new TextEncoder().encode(text)), bytesOf];
  const ranks = new Map(tokens.map((token, id) => [token, id]));
  const words = (text) => text.toWellFormed().match(PRE_TOKENS) ?? [];
  return [(text) => words(text).flatMap((word) => encodeWord(toBytes(word), ranks)), bytesOf];
}

// The characters of a text, each once, that a `char` vocabulary does not have.
function charactersWithoutToken(tokenizer, text) {
  const characters = tokenizer?.kind === "char" ? Array.from(new Set(text.toWellFormed())) : [];
  return characters.filter((character) => !tokenizer.characters.includes(character));
}

// Byte-pair encoding: merge the adjacent pair that forms the token with the smallest id, until none does.
function encodeWord(parts, ranks) {
  const whole = ranks.get(parts.join(""));
  if (whole !== undefined) return [whole];
  for (;;) {
    const merged = range(parts.length - 1).map((k) => ranks.get(parts[k] + parts[k + 1]) ?? Infinity);
    const best = Math.min(...merged);
    if (best === Infinity) return parts.map((part) => ranks.get(part));
    const k = merged.indexOf(best);
    parts.splice(k, 2, parts[k] + parts[k + 1]);
  }
}
