// The JavaScript runtimes by name, each from the folder that installs it.

import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

/**
 * @param {"node" | "web" | "webgpu"} kind onnxruntime-node; onnxruntime-web's WebAssembly build; the CPU part of its WebGPU
 *   build, which is what that build falls back to
 */
export async function runtime(kind) {
  if (kind === "node") {
    const ort = createRequire(import.meta.url)("onnxruntime-node");
    return { ort, options: { executionProviders: ["cpu"], intraOpNumThreads: 1 } };
  }
  const page = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
  let ort;
  if (kind === "web") {
    ort = page("onnxruntime-web");
  } else if (kind === "webgpu") {
    const bundle = join(dirname(page.resolve("onnxruntime-web")), "ort.webgpu.bundle.min.mjs");
    ort = await import(pathToFileURL(bundle).href);
  } else {
    throw new Error(`runtime is ${kind}, expected node, web or webgpu`);
  }
  ort.env.wasm.numThreads = 1;
  return { ort, options: { executionProviders: ["wasm"] } };
}
