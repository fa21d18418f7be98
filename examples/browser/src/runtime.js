// onnxruntime-web: WebAssembly always, WebGPU where the browser has an adapter.

/** @returns {Promise<{adapter: string | null, why: string}>} the adapter's name, or why there is none */
export async function webgpuAdapter() {
  if (!("gpu" in navigator)) return { adapter: null, why: "this browser has no WebGPU" };
  try {
    const adapter = await navigator.gpu.requestAdapter();
    if (!adapter) return { adapter: null, why: "the browser has WebGPU, but found no adapter" };
    const { vendor, architecture, description } = adapter.info ?? {};
    return { adapter: description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed adapter", why: "" };
  } catch (error) {
    return { adapter: null, why: `WebGPU could not start: ${error.message}` };
  }
}

/**
 * The library for a provider. The WebGPU build is twice as large, and its CPU kernels have no float64.
 *
 * @param {"wasm" | "webgpu"} provider
 */
export async function loadRuntime(provider) {
  const ort = await (provider === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
  ort.env.wasm.numThreads = 1; // the operations are too small to share, and threads need special HTTP headers
  ort.env.logLevel = "error";
  return ort;
}

/**
 * @param {any} ort
 * @param {string} name of the file, for the error
 * @param {ArrayBuffer} model
 * @param {"wasm" | "webgpu"} provider
 * @param {string[]} onCpu nodes that WebGPU takes when the model is loaded, and fails on when it runs
 */
export async function createSession(ort, name, model, provider, onCpu = []) {
  try {
    // The buffer is copied: creating a session may take it over.
    return await ort.InferenceSession.create(new Uint8Array(model.slice(0)), {
      executionProviders: provider === "webgpu" ? [{ name: "webgpu", forceCpuNodeNames: onCpu }, "wasm"] : ["wasm"],
      logSeverityLevel: 3, // errors; what WebGPU leaves to the CPU is no news
    });
  } catch (error) {
    throw new Error(`onnxruntime-web cannot load ${name}: ${error.message ?? error}`);
  }
}
