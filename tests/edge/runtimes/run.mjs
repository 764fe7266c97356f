// node run.mjs PACKAGES BUNDLE KEY < jobs.json: run each job with onnxruntime-node, print results.
import fs from 'node:fs';
import path from 'node:path';
import {createRequire} from 'node:module';
import {AdamW, infer, openBundle, step} from '../../../examples/browser/anabranch.mjs';

const [, , packages, folder, trusted] = process.argv;
const ort = createRequire(path.resolve(packages, 'package.json'))('onnxruntime-node');
const read = async (name) => new Uint8Array(fs.readFileSync(path.join(folder, name)));
const makeSession = (graph, externalData) =>
  ort.InferenceSession.create(graph, {intraOpNumThreads: 1, logSeverityLevel: 3, externalData});

const bundle = await openBundle(read, trusted);
const jobs = JSON.parse(fs.readFileSync(0, 'utf8'));
const sessions = {};
const results = [];
for (const job of jobs) {
  const session = (sessions[job.graph] ??= await bundle.session(makeSession, job.graph));
  const batch = {...bundle.tokenizer.batch(job.texts), labels: job.labels};
  if (job.graph.startsWith('infer')) {
    results.push({logits: [...(await infer(ort, session, batch, bundle.adapter))]});
    continue;
  }
  const optimizer = new AdamW({learningRate: job.learning_rate});
  const losses = [];
  let first;
  for (let i = 0; i < job.steps; i++) {
    const {loss, gradients} = await step(ort, session, batch, bundle.adapter);
    first ??= Object.fromEntries(Object.entries(gradients).map(([n, g]) => [n, [...g]]));
    losses.push(loss);
    optimizer.update(bundle.adapter, gradients);
  }
  const adapter = Object.entries(bundle.adapter).map(([n, t]) => [n, [...t.data]]);
  results.push({losses, gradients: first, adapter: Object.fromEntries(adapter)});
}
const ids = jobs.map((job) => job.texts.map((text) => bundle.tokenizer.encode(text)));
process.stdout.write(JSON.stringify({results, ids}));
