// Named tensors in one buffer, as https://github.com/huggingface/safetensors lays them out: the length of a JSON header
// (8 bytes, little endian), the header, then the tensors' bytes. This is what the exporter's checkpoints are.

const ARRAYS = {
  F32: Float32Array,
  F64: Float64Array,
  I64: BigInt64Array, // JavaScript's numbers do not hold 64-bit integers
  U64: BigUint64Array,
  I32: Int32Array,
  U32: Uint32Array,
  I16: Int16Array,
  U16: Uint16Array,
  I8: Int8Array,
  U8: Uint8Array,
  BOOL: Uint8Array,
};

/** onnxruntime's name of each safetensors type. */
export const ORT_TYPES = {
  F32: "float32",
  F64: "float64",
  I64: "int64",
  U64: "uint64",
  I32: "int32",
  U32: "uint32",
  I16: "int16",
  U16: "uint16",
  I8: "int8",
  U8: "uint8",
  BOOL: "bool",
};

/**
 * @typedef {{dtype: keyof typeof ARRAYS, shape: number[], data: any}} NamedTensor
 *
 * Read a buffer. The arrays are copies, so that each is aligned and none keeps the whole buffer alive.
 *
 * @param {ArrayBuffer} buffer
 * @returns {{tensors: Map<string, NamedTensor>, metadata: Record<string, string>}}
 */
export function readSafetensors(buffer) {
  const fail = (what) => {
    throw new Error(`not a safetensors file, or a truncated one: ${what}`);
  };
  if (buffer.byteLength < 8) fail(`${buffer.byteLength} bytes`);
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  if (8 + length > buffer.byteLength) fail(`a header of ${length} bytes in a file of ${buffer.byteLength}`);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(buffer, 8, length)));
  } catch (error) {
    fail(error.message);
  }
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    const kind = ARRAYS[dtype];
    if (!kind) fail(`${name} has the type ${dtype}, expected one of ${Object.keys(ARRAYS).join(", ")}`);
    const size = shape.reduce((product, n) => product * n, 1) * kind.BYTES_PER_ELEMENT;
    if (end - begin !== size || 8 + length + end > buffer.byteLength) fail(`${name} does not lie within the file`);
    tensors.set(name, { dtype, shape, data: new kind(buffer.slice(8 + length + begin, 8 + length + end)) });
  }
  return { tensors, metadata };
}

/**
 * @param {Map<string, NamedTensor>} tensors
 * @param {Record<string, string>} metadata
 * @returns {ArrayBuffer}
 */
export function writeSafetensors(tensors, metadata = {}) {
  const header = Object.keys(metadata).length ? { __metadata__: metadata } : {};
  let offset = 0;
  for (const [name, { dtype, shape, data }] of tensors) {
    header[name] = { dtype, shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (new TextEncoder().encode(text).length % 8)) % 8); // the tensors start at a multiple of 8
  const bytes = new TextEncoder().encode(text);
  const result = new Uint8Array(8 + bytes.length + offset);
  new DataView(result.buffer).setBigUint64(0, BigInt(bytes.length), true);
  result.set(bytes, 8);
  let at = 8 + bytes.length;
  for (const { data } of tensors.values()) {
    result.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return result.buffer;
}

/** @param {any} ort @param {NamedTensor} tensor */
export function toOrt(ort, { dtype, shape, data }) {
  return new ort.Tensor(ORT_TYPES[dtype], data, shape);
}

/** @param {any} tensor @returns {NamedTensor} */
export function fromOrt(tensor) {
  const dtype = Object.keys(ORT_TYPES).find((key) => ORT_TYPES[key] === tensor.type);
  if (!dtype) throw new Error(`a tensor of type ${tensor.type} cannot be written to safetensors`);
  return { dtype: /** @type {NamedTensor["dtype"]} */ (dtype), shape: [...tensor.dims], data: tensor.data };
}
