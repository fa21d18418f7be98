// The files that export_assets.py writes, fetched and checked.

/**
 * @param {string} base URL of the folder
 * @returns {Promise<{manifest: any, files: Map<string, ArrayBuffer>}>}
 * @throws an Error that names the file, what is wrong with it, and what to do
 */
export async function loadAssets(base) {
  const manifest = JSON.parse(new TextDecoder().decode(await fetchFile(base, "manifest.json")));
  const names = Object.keys(manifest.files ?? {});
  if (!names.includes("step.onnx")) throw new Error("manifest.json names no step.onnx: run export_assets.py again");
  const buffers = await Promise.all(names.map((name) => fetchFile(base, name)));
  const files = new Map(names.map((name, i) => [name, buffers[i]]));
  for (const [name, { bytes, sha256 }] of Object.entries(manifest.files)) {
    const buffer = files.get(name);
    // Browsers offer hashes on https and localhost only; the length is checked everywhere.
    const damaged =
      buffer.byteLength !== bytes
        ? `it has ${buffer.byteLength} bytes, the manifest says ${bytes}`
        : crypto.subtle && (await hex(buffer)) !== sha256
          ? "its contents do not match the manifest's checksum"
          : null;
    if (damaged) throw new Error(`${name} is damaged or of another export: ${damaged}. Run export_assets.py and build again.`);
  }
  return { manifest, files };
}

async function fetchFile(base, name) {
  let response;
  try {
    response = await fetch(base + name, { cache: "no-cache" });
  } catch (error) {
    throw new Error(`${name} cannot be fetched: ${error.message}`);
  }
  const type = response.headers.get("content-type") ?? "";
  // A development server answers a missing file with its index page.
  if (!response.ok || type.startsWith("text/html")) {
    throw new Error(`${name} is missing (HTTP ${response.status}): run export_assets.py, then build again.`);
  }
  return response.arrayBuffer();
}

async function hex(buffer) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Pixels and labels as onnxruntime's arrays; the first `train` are for training. */
export class Digits {
  /** @param {any} manifest @param {Map<string, ArrayBuffer>} files */
  constructor(manifest, files) {
    this.size = manifest.image.reduce((product, n) => product * n, 1);
    this.image = manifest.image;
    this.pixels = new Uint8Array(files.get("images.bin"));
    this.labels = new Uint8Array(files.get("labels.bin"));
    this.order = new Uint16Array(files.get("order.bin"));
    this.train = manifest.train;
    this.test = manifest.test;
    this.batchSize = manifest.batchSize;
  }

  /** Number of batches until the order begins again. */
  get period() {
    return this.order.length / this.batchSize;
  }

  /** @param {ArrayLike<number>} indices */
  samples(indices) {
    const x = new Float32Array(indices.length * this.size);
    const y = new BigInt64Array(indices.length);
    for (let i = 0; i < indices.length; i++) {
      const at = indices[i] * this.size;
      for (let j = 0; j < this.size; j++) x[i * this.size + j] = this.pixels[at + j] / 16;
      y[i] = BigInt(this.labels[indices[i]]);
    }
    return { x, y };
  }

  /** The batch of a step, counted from 0, in Python's order. */
  batch(step) {
    const start = (step % this.period) * this.batchSize;
    return this.samples(this.order.subarray(start, start + this.batchSize));
  }

  testSet() {
    return this.samples(Array.from({ length: this.test }, (_, i) => this.train + i));
  }
}
