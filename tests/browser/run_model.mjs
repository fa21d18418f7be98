// node run_model.mjs RUNTIME MODEL INPUTS OUTPUTS: one run of a model, tensors in and out as safetensors.
// RUNTIME is "node" for onnxruntime-node or "web" for onnxruntime-web's WebAssembly build.

import { readFileSync, writeFileSync } from "node:fs";
import { fromOrt, readSafetensors, toOrt, writeSafetensors } from "../../examples/browser/src/safetensors.js";
import { runtime } from "./runtime.mjs";

const [kind, model, inputs, outputs] = process.argv.slice(2);
const { ort, options } = await runtime(kind);
const bytes = readFileSync(inputs);
const { tensors } = readSafetensors(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
const session = await ort.InferenceSession.create(readFileSync(model), options);
const feeds = Object.fromEntries([...tensors].map(([name, tensor]) => [name, toOrt(ort, tensor)]));
const results = await session.run(feeds);
const named = new Map(Object.entries(results).map(([name, tensor]) => [name, fromOrt(tensor)]));
writeFileSync(outputs, new Uint8Array(writeSafetensors(named)));
