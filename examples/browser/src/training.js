// A training step exported by convgrad_export, run step by step. The same code runs in the page's worker on onnxruntime-web
// and in Node.js on onnxruntime-node: the runtime is an argument.

import { fromOrt, readSafetensors, toOrt, writeSafetensors } from "./safetensors.js";

const SUFFIX = ".updated";

/** State in, loss and new state out: what `cg.TrainingSession` is in Python. */
export class TrainingStep {
  /**
   * @param {any} ort onnxruntime-web or onnxruntime-node
   * @param {any} session of the training step
   * @param {ArrayBuffer} checkpoint safetensors with every state tensor
   */
  constructor(ort, session, checkpoint) {
    this.ort = ort;
    this.session = session;
    this.updated = session.outputNames.filter((name) => name.endsWith(SUFFIX)).map((name) => name.slice(0, -SUFFIX.length));
    if (!session.outputNames.includes("loss") || !session.inputNames.includes("learning_rate") || !this.updated.length) {
      throw new Error(
        `the model is no training step: its outputs are ${session.outputNames.slice(0, 4).join(", ")}; ` +
          "write one with cg.export_training_step",
      );
    }
    this.restore(checkpoint);
  }

  /** Take the state of a checkpoint. It has to name every state tensor of the model. */
  restore(checkpoint) {
    const { tensors } = readSafetensors(checkpoint);
    const missing = this.updated.filter((name) => !tensors.has(name));
    if (missing.length) throw new Error(`the checkpoint does not fit the model: it lacks ${missing.join(", ")}`);
    this.unread = new Map([...tensors].filter(([name]) => !this.session.inputNames.includes(name)));
    this.state = new Map(
      [...tensors].filter(([name]) => this.session.inputNames.includes(name)).map(([name, t]) => [name, toOrt(this.ort, t)]),
    );
  }

  /** Number of updates so far. */
  get steps() {
    return Number(this.state.get("step").data[0]);
  }

  /**
   * One step on a batch.
   *
   * @param {Record<string, any>} batch onnxruntime tensors by name: the inputs and the targets
   * @param {{learningRate: number, seed?: bigint}} options
   * @returns {Promise<number>} the loss before the update; a loss that is not finite leaves the state as it was
   */
  async step(batch, { learningRate, seed = 0n }) {
    const feeds = { ...batch, ...Object.fromEntries(this.state) };
    feeds.learning_rate = new this.ort.Tensor("float32", Float32Array.of(learningRate), []);
    if (this.session.inputNames.includes("seed")) feeds.seed = new this.ort.Tensor("int64", BigInt64Array.of(seed), []);
    const results = await this.session.run(feeds);
    const loss = results.loss.data[0];
    if (!Number.isFinite(loss)) throw new Error(`the loss is ${loss} at step ${this.steps + 1}: lower the learning rate`);
    for (const name of this.updated) this.state.set(name, results[name + SUFFIX]);
    return loss;
  }

  /** @returns {ArrayBuffer} the state as safetensors, which `restore` and Python's `load_file` read */
  save(metadata = {}) {
    const tensors = new Map(this.unread);
    for (const [name, tensor] of this.state) tensors.set(name, fromOrt(tensor));
    return writeSafetensors(tensors, metadata);
  }
}
