// The JavaScript runtimes by name, each from the folder that installs it.

import { createRequire } from "node:module";

/** @param {"node" | "web"} kind */
export function runtime(kind) {
  if (kind === "node") {
    const ort = createRequire(import.meta.url)("onnxruntime-node");
    return { ort, options: { executionProviders: ["cpu"], intraOpNumThreads: 1 } };
  }
  if (kind === "web") {
    const ort = createRequire(new URL("../../examples/browser/package.json", import.meta.url))("onnxruntime-web");
    ort.env.wasm.numThreads = 1;
    return { ort, options: { executionProviders: ["wasm"] } };
  }
  throw new Error(`runtime is ${kind}, expected node or web`);
}
