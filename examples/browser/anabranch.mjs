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

  /** Return a session: makeSession(graph bytes, [{path, data}]), every byte verified first. */
  const session = async (makeSession, name) => {
    const graph = manifest.graphs[name];
    if (!graph) throw new Error(`${name}: expected one of ${Object.keys(manifest.graphs)}`);
    const data = [];
    for (const path of graph.data ?? []) data.push({path, data: await file(path)});
    const adapter = new Set(manifest.spec.tensors.map(([tensor]) => tensor));
    return makeSession(withoutDefaults(await file(graph.file), adapter), data);
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

/**
 * Return an ONNX model without the initializers called `names`: then these inputs must be fed.
 *
 * An inference graph holds the released adapter as defaults, which onnxruntime's JavaScript
 * packages do not let a caller replace. Protobuf: the model's field 7 is the graph, whose field 5
 * is an initializer, whose field 8 is its name.
 */
export function withoutDefaults(model, names) {
  const keep = (bytes, change) => {
    const parts = [];
    for (const field of fields(bytes)) parts.push(...change(field));
    return concat(parts);
  };
  const named = (tensor) => fields(tensor).some((f) => f.number === 8 && names.has(TEXT.decode(f.body)));
  return keep(model, (field) => {
    if (field.number !== 7) return [field.all];
    const graph = keep(field.body, (f) => (f.number === 5 && named(f.body) ? [] : [f.all]));
    return [varint((7 << 3) | 2), varint(graph.length), graph];
  });
}

/** Return [{number, body, all}] of a protobuf message. */
function fields(bytes) {
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const begin = at;
    const next = () => {
      let value = 0;
      for (let shift = 1; ; shift *= 128) {
        if (at >= bytes.length) throw new Error('the graph is cut off');
        const byte = bytes[at++];
        value += (byte & 127) * shift;
        if (byte < 128) return value;
      }
    };
    const tag = next();
    let start = at;
    if (tag % 8 === 0) next();
    else if (tag % 8 === 1) at += 8;
    else if (tag % 8 === 5) at += 4;
    else {
      const size = next();
      start = at;
      at += size;
    }
    if (at > bytes.length) throw new Error('the graph is cut off');
    found.push({number: Math.floor(tag / 8), body: bytes.subarray(start, at), all: bytes.subarray(begin, at)});
  }
  return found;
}

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Uint8Array.from([...bytes, value]);
}

function concat(parts) {
  const result = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    result.set(part, at);
    at += part.length;
  }
  return result;
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

/** Return the logits (rows × labels, flat). */
export async function infer(ort, session, batch, adapter) {
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
