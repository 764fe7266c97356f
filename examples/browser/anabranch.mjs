// Open a signed bundle and train its adapter, in a browser or in Node: no library but onnxruntime.
//
//   const bundle = await openBundle(read, trustedKeyHex);   // read(name) -> Promise<Uint8Array>
//   const session = await bundle.session(makeSession, 'train_step.fp32');
//   const {loss, gradients} = await step(ort, session, batch, adapter);

const TEXT = new TextDecoder();
const DOMAIN = new TextEncoder().encode('anabranch bundle\0');

const hex = (bytes) => [...bytes].map((b) => b.toString(16).padStart(2, '0')).join('');
const fromHex = (text) => new Uint8Array(text.match(/../g).map((pair) => parseInt(pair, 16)));
const sha256 = async (bytes) => hex(new Uint8Array(await crypto.subtle.digest('SHA-256', bytes)));

/** Return the bundle whose files `read` gives. Throws unless `trusted` (hex) signed the manifest. */
export async function openBundle(read, trusted) {
  const bytes = await read('manifest.json');
  const signed = JSON.parse(TEXT.decode(await read('manifest.sig')));
  if (signed.key !== trusted) throw new Error(`bundle is signed by ${signed.key}, not by ${trusted}`);
  const message = new Uint8Array([...DOMAIN, ...bytes]);
  const key = await crypto.subtle.importKey('raw', fromHex(trusted), 'Ed25519', false, ['verify']);
  if (!(await crypto.subtle.verify('Ed25519', key, fromHex(signed.signature), message)))
    throw new Error('manifest.sig does not fit manifest.json: fetch the bundle again');
  const manifest = JSON.parse(TEXT.decode(bytes));

  const file = async (name) => {
    const expected = manifest.files[name];
    if (!expected) throw new Error(`${name}: not in the manifest`);
    const data = await read(name);
    if (data.length !== expected.bytes || (await sha256(data)) !== expected.sha256)
      throw new Error(`${name}: SHA-256 differs from the manifest; fetch the bundle again`);
    return data;
  };

  /** Return a session: makeSession(graph bytes, [{path, data}], file name); all verified first. */
  const session = async (makeSession, name) => {
    const graph = manifest.graphs[name];
    if (!graph) throw new Error(`${name}: expected one of ${Object.keys(manifest.graphs)}`);
    const data = [];
    for (const path of graph.data ?? []) data.push({path, data: await file(path)});
    return makeSession(await file(graph.file), data, graph.file);
  };

  const tokenizer = manifest.files['tokenizer.json']
    ? new WordPiece(JSON.parse(TEXT.decode(await file('tokenizer.json'))))
    : null;
  return {manifest, adapter: readFrame(await file('adapter.bin')), tokenizer, session};
}

/** Return {name: {shape, data}} of the adapter in a frame (docs/wire-format.md). */
export function readFrame(bytes) {
  if (TEXT.decode(bytes.subarray(0, 4)) !== 'ABA1') throw new Error('adapter: expected magic ABA1');
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const size = view.getUint32(4, true);
  const {kind, spec} = JSON.parse(TEXT.decode(bytes.subarray(8, 8 + size)));
  if (kind !== 'adapter') throw new Error(`expected an adapter, got ${kind}`);
  let at = 8 + size;
  const tensors = {};
  for (const [name, shape] of spec.tensors) {
    const count = shape.reduce((a, b) => a * b, 1);
    const data = new Float32Array(bytes.slice(at, at + 4 * count).buffer);
    tensors[name] = {shape, data};
    at += 4 * count;
  }
  if (at + 32 !== bytes.length) throw new Error('adapter: the frame has another length than it says');
  return tensors;
}

/** Run a training step. Returns the loss Σ w ℓ and the gradient of every tensor of the adapter. */
export async function step(ort, session, batch, adapter) {
  const feeds = {...inputs(ort, batch), ...tensors(ort, adapter)};
  const rows = batch.labels.length;
  feeds.labels = new ort.Tensor('int64', BigInt64Array.from(batch.labels, BigInt), [rows]);
  const weights = batch.weights ?? new Array(rows).fill(1 / rows);
  feeds.weights = new ort.Tensor('float32', Float32Array.from(weights), [rows]);
  const out = await session.run(feeds);
  const gradients = {};
  for (const name of Object.keys(adapter)) gradients[name] = out[`${name}.grad`].data;
  return {loss: out.loss.data[0], logits: out.logits.data, gradients};
}

/** Return the logits (rows × labels, flat). Without `adapter` the released one is used. */
export async function infer(ort, session, batch, adapter = {}) {
  const out = await session.run({...inputs(ort, batch), ...tensors(ort, adapter)});
  return out.logits.data;
}

function inputs(ort, {ids, mask, shape}) {
  return {
    input_ids: new ort.Tensor('int64', ids, shape),
    attention_mask: new ort.Tensor('int64', mask, shape),
  };
}

function tensors(ort, adapter) {
  const result = {};
  for (const [name, {shape, data}] of Object.entries(adapter))
    result[name] = new ort.Tensor('float32', data, shape);
  return result;
}

/** AdamW (Loshchilov and Hutter 2019), as torch.optim.AdamW. Changes `adapter` in place. */
export class AdamW {
  constructor({learningRate = 1e-3, weightDecay = 0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8} = {}) {
    Object.assign(this, {learningRate, weightDecay, beta1, beta2, epsilon, steps: 0, moments: {}});
  }

  update(adapter, gradients) {
    this.steps += 1;
    const first = 1 - this.beta1 ** this.steps;
    const second = 1 - this.beta2 ** this.steps;
    for (const [name, {data}] of Object.entries(adapter)) {
      const g = gradients[name];
      const zeros = () => new Float32Array(data.length);
      const {m, v} = (this.moments[name] ??= {m: zeros(), v: zeros()});
      for (let i = 0; i < data.length; i++) {
        m[i] = this.beta1 * m[i] + (1 - this.beta1) * g[i];
        v[i] = this.beta2 * v[i] + (1 - this.beta2) * g[i] * g[i];
        data[i] *= 1 - this.learningRate * this.weightDecay;
        data[i] -= (this.learningRate * (m[i] / first)) / (Math.sqrt(v[i] / second) + this.epsilon);
      }
    }
  }
}

/** WordPiece from the bundle's tokenizer.json: the same ids as the Python runtime. */
export class WordPiece {
  constructor(data) {
    this.data = data;
    this.ids = new Map(data.vocabulary.map((token, id) => [token, id]));
    const special = [...data.special].sort((a, b) => b.length - a.length);
    const escaped = special.map((text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
    this.special = special.length ? new RegExp(`(${escaped.join('|')})`) : null;
  }

  encode(text) {
    const room = this.data.max_tokens - 2;
    const pieces = [];
    for (const part of this.special ? text.split(this.special) : [text]) {
      if (this.data.special.includes(part)) pieces.push(this.ids.get(part));
      else for (const word of this.words(part)) pieces.push(...this.cut(word));
    }
    return [this.data.first, ...pieces.slice(0, room), this.data.last];
  }

  /** Return {ids, mask, shape} of texts, padded on the right. */
  batch(texts) {
    const rows = texts.map((text) => this.encode(text));
    const width = Math.max(...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(this.data.padding));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => row.forEach((id, t) => {
      ids[r * width + t] = BigInt(id);
      mask[r * width + t] = 1n;
    }));
    return {ids, mask, shape: [rows.length, width]};
  }

  words(text) {
    const c = this.data.characters;
    text = translate(text, [[c.drop, () => ''], [c.blank, () => ' '], [c.apart, (x) => ` ${x} `]]);
    if (c.decompose) text = text.normalize('NFD');
    const after = [[c.marks, () => ''], [c.split, () => ' '], [c.punctuation, (x) => ` ${x} `]];
    return translate(text, after, c.lower).split(' ').filter((word) => word);
  }

  cut(word) {
    const chars = [...word];
    if (chars.length > this.data.max_word) return [this.data.unknown];
    const ids = [];
    for (let start = 0; start < chars.length; ) {
      const prefix = start ? this.data.prefix : '';
      let end = chars.length;
      let id;
      for (; end > start; end--) {
        id = this.ids.get(prefix + chars.slice(start, end).join(''));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.data.unknown];
      ids.push(id);
      start = end;
    }
    return ids;
  }
}

function translate(text, rules, table = {}) {
  const one = (char) => {
    if (Object.hasOwn(table, char)) return table[char];
    const code = char.codePointAt(0);
    for (const [ranges, rule] of rules)
      if (ranges.some(([first, last]) => first <= code && code <= last)) return rule(char);
    return char;
  };
  return Array.from(text, one).join('');
}
