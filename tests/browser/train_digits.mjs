// node train_digits.mjs RUNTIME ASSETS STEPS OUTPUT [RATE]: the page's training in Node.js; prints the losses as JSON and
// writes the last state. RUNTIME as in run_model.mjs.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Digits } from "../../examples/browser/src/assets.js";
import { TrainingStep } from "../../examples/browser/src/training.js";
import { runtime } from "./runtime.mjs";

const [kind, folder, steps, output, rate] = process.argv.slice(2);
const read = (name) => {
  const bytes = readFileSync(join(folder, name));
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
};
const manifest = JSON.parse(new TextDecoder().decode(read("manifest.json")));
const digits = new Digits(manifest, new Map(Object.keys(manifest.files).map((name) => [name, read(name)])));
const { ort, options } = await runtime(kind);
const session = await ort.InferenceSession.create(new Uint8Array(read("step.onnx")), options);
const step = new TrainingStep(ort, session, read("step.checkpoint.safetensors"));
const losses = [];
for (let i = 0; i < Number(steps); i++) {
  const { x, y } = digits.batch(i);
  const batch = {
    x: new ort.Tensor("float32", x, [y.length, ...manifest.image]),
    target: new ort.Tensor("int64", y, [y.length]),
  };
  losses.push(await step.step(batch, { learningRate: Number(rate ?? manifest.learningRate), seed: BigInt(manifest.seed) }));
}
writeFileSync(output, new Uint8Array(step.save()));
console.log(JSON.stringify(losses));
