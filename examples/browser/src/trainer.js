// The training in the worker: sessions, the loop, evaluation, Grad-CAM, and what is kept over a reload.

import { Digits, loadAssets } from "./assets.js";
import { createSession, loadRuntime, webgpuAdapter } from "./runtime.js";
import { deleteRecord, loadRecord, saveRecord } from "./storage.js";
import { TrainingStep } from "./training.js";

const RECORD = "digits";
const SLICE_MS = 30; // work between two looks at the messages
const TRIAL_STEPS = 12;
const TRIAL_MS = 1500;

export class Trainer {
  /** @param {(message: any) => void} post */
  constructor(post) {
    this.post = post;
    this.running = false;
    this.losses = [];
    this.accuracies = [];
    this.turn = Promise.resolve();
  }

  /** One at a time: a WebGPU session does not take a second run before the first has ended. */
  exclusive(action) {
    const result = this.turn.then(action);
    this.turn = result.catch(() => undefined);
    return result;
  }

  /** @param {string} base @param {"auto" | "wasm" | "webgpu"} wanted */
  async load(base, wanted) {
    const { manifest, files } = await loadAssets(base);
    this.manifest = manifest;
    this.files = files;
    this.digits = new Digits(manifest, files);
    this.learningRate = manifest.learningRate;
    const { adapter, why } = await webgpuAdapter();
    this.trials = {};
    this.webgpuProblem = why;
    await this.chooseProvider(wanted, adapter);
    this.evaluation = await createSession(this.ort, "evaluate.onnx", files.get("evaluate.onnx"), "wasm");
    this.explanation = await createSession(this.ort, "explain.onnx", files.get("explain.onnx"), "wasm");
    const restored = await this.restore();
    this.post({
      type: "ready",
      manifest,
      restored,
      adapter,
      provider: this.provider,
      trials: this.trials,
      webgpuProblem: this.webgpuProblem,
      version: this.ort.env.versions?.web ?? this.ort.env.versions?.common ?? "",
      reference: new Float32Array(files.get("reference_loss.bin")),
    });
    this.reportAll();
    if (!restored) await this.evaluate();
  }

  /** Steps a second of one provider on a state of its own. */
  async trial(provider) {
    this.ort = await loadRuntime(provider);
    const model = this.files.get("step.onnx");
    const session = await createSession(this.ort, "step.onnx", model, provider, this.manifest.onCpu);
    const step = new TrainingStep(this.ort, session, this.files.get("step.checkpoint.safetensors"));
    let shortest = Infinity; // the first steps compile shaders, or run before the browser has optimised the code
    const opened = performance.now();
    for (let i = 0; i < TRIAL_STEPS && (i < 2 || performance.now() - opened < TRIAL_MS); i++) {
      const start = performance.now();
      await step.step(this.batch(i), this.stepOptions());
      shortest = Math.min(shortest, performance.now() - start);
    }
    this.trials[provider] = 1000 / shortest;
    step.restore(this.files.get("step.checkpoint.safetensors"));
    return step;
  }

  async chooseProvider(wanted, adapter) {
    const candidates = wanted === "auto" ? (adapter ? ["webgpu", "wasm"] : ["wasm"]) : [wanted];
    if (wanted === "webgpu" && !adapter) candidates[0] = "wasm";
    const steps = {};
    for (const provider of candidates) {
      try {
        steps[provider] = await this.trial(provider);
      } catch (error) {
        if (provider !== "webgpu") throw error;
        this.webgpuProblem = `WebGPU did not run the step: ${error.message}`;
        if (!candidates.includes("wasm")) candidates.push("wasm");
      }
    }
    this.provider = Object.keys(steps).sort((a, b) => this.trials[b] - this.trials[a])[0];
    this.step = steps[this.provider];
    this.ort = this.step.ort;
    for (const [provider, step] of Object.entries(steps)) {
      if (provider !== this.provider) await step.session.release();
    }
  }

  async restore() {
    let record;
    try {
      record = await loadRecord(RECORD);
    } catch (error) {
      this.warn(`the browser's storage cannot be read, so a reload will lose the training: ${error?.message ?? error}`);
      return false;
    }
    if (!record) return false;
    if (record.model !== this.manifest.files["step.onnx"].sha256) {
      this.warn("the stored training belongs to another export of the model; this one starts from its beginning");
      return false;
    }
    try {
      this.step.restore(record.checkpoint);
    } catch (error) {
      this.warn(`the stored training cannot be read: ${error.message}`);
      return false;
    }
    this.losses = [...record.losses];
    this.accuracies = record.accuracies;
    return true;
  }

  async save() {
    try {
      await saveRecord(RECORD, {
        model: this.manifest.files["step.onnx"].sha256,
        checkpoint: this.step.save(),
        losses: Float32Array.from(this.losses),
        accuracies: this.accuracies,
      });
      this.post({ type: "saved", steps: this.step.steps });
    } catch (error) {
      this.warn(`the browser's storage cannot be written, so a reload will lose the training: ${error?.message ?? error}`);
    }
  }

  warn(message) {
    this.post({ type: "warning", message });
  }

  batch(step) {
    const { x, y } = this.digits.batch(step);
    const { Tensor } = this.ort;
    return {
      x: new Tensor("float32", x, [y.length, ...this.digits.image]),
      target: new Tensor("int64", y, [y.length]),
    };
  }

  stepOptions() {
    return { learningRate: this.learningRate, seed: BigInt(this.manifest.seed) };
  }

  /** Parameters and buffers for a model that takes them as inputs. */
  stateFor(session) {
    return Object.fromEntries([...this.step.state].filter(([name]) => session.inputNames.includes(name)));
  }

  async start(until = Infinity) {
    if (this.running) return;
    this.running = true;
    this.post({ type: "running", running: true });
    let rate = 0;
    try {
      while (this.running && this.step.steps < until) {
        const start = performance.now();
        const before = this.losses.length;
        await this.exclusive(async () => {
          do {
            this.losses.push(await this.step.step(this.batch(this.step.steps), this.stepOptions()));
          } while (
            this.running &&
            this.step.steps < until &&
            this.step.steps % this.manifest.stepsPerEpoch !== 0 &&
            performance.now() - start < SLICE_MS
          );
        });
        const now = ((this.losses.length - before) * 1000) / (performance.now() - start);
        rate = rate ? 0.9 * rate + 0.1 * now : now;
        this.post({ type: "losses", from: before, losses: this.losses.slice(before), rate });
        if (this.step.steps % this.manifest.stepsPerEpoch === 0) {
          await this.evaluate();
          if (this.losses.length) await this.save(); // reset in between
        }
        await new Promise((resolve) => setTimeout(resolve)); // let messages in
      }
    } finally {
      this.running = false;
      this.post({ type: "running", running: false });
    }
    if (!this.losses.length) return; // reset in between
    await this.evaluate();
    await this.save();
  }

  pause() {
    this.running = false;
  }

  async reset() {
    this.pause();
    await this.exclusive(async () => {
      this.step.restore(this.files.get("step.checkpoint.safetensors"));
      this.losses = [];
      this.accuracies = [];
      await deleteRecord(RECORD).catch((error) => this.warn(`the stored training could not be deleted: ${error?.message}`));
    });
    this.reportAll();
    await this.evaluate();
  }

  reportAll() {
    this.post({ type: "history", losses: Float32Array.from(this.losses), accuracies: this.accuracies, steps: this.step.steps });
  }

  async evaluate() {
    await this.exclusive(async () => {
      const { x, y } = this.digits.testSet();
      const feeds = {
        ...this.stateFor(this.evaluation),
        x: new this.ort.Tensor("float32", x, [y.length, ...this.digits.image]),
      };
      const { scores } = await this.evaluation.run(feeds);
      const classes = this.manifest.classes;
      let right = 0;
      for (let i = 0; i < y.length; i++) {
        const row = scores.data.subarray(i * classes, (i + 1) * classes);
        if (row.indexOf(Math.max(...row)) === Number(y[i])) right++;
      }
      const point = { step: this.step.steps, accuracy: right / y.length };
      if (this.accuracies.at(-1)?.step === point.step) this.accuracies.pop();
      this.accuracies.push(point);
      this.post({ type: "accuracy", ...point, right, total: y.length });
    });
  }

  /** @param {Float32Array} image @param {number | null} digit null: the best one @param {number} id */
  async explain(image, digit, id) {
    await this.exclusive(async () => {
      const { Tensor } = this.ort;
      const classes = this.manifest.classes;
      const run = (wanted) => {
        const weights = new Float32Array(classes);
        weights[wanted] = 1;
        return this.explanation.run({
          ...this.stateFor(this.explanation),
          x: new Tensor("float32", image, [1, ...this.digits.image]),
          digit: new Tensor("float32", weights, [1, classes]),
        });
      };
      let results = await run(digit ?? 0);
      const scores = results.scores.data;
      const best = scores.indexOf(Math.max(...scores));
      if (digit === null && best !== 0) results = await run(best);
      const exps = Array.from(scores, (s) => Math.exp(s - scores[best]));
      const sum = exps.reduce((a, b) => a + b);
      const maps = this.manifest.layers.map((name) => ({
        name,
        shape: results[name].dims.slice(1),
        values: Float32Array.from(results[name].data),
      }));
      this.post({ type: "explained", id, probabilities: exps.map((e) => e / sum), best, digit: digit ?? best, maps });
    });
  }

  /** A test image and its label, for those who cannot draw. */
  sample(index) {
    const at = this.digits.train + (index % this.digits.test);
    const { x, y } = this.digits.samples([at]);
    this.post({ type: "sample", image: x, label: Number(y[0]) });
  }
}
