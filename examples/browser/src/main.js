// The page: what the worker says goes into the document, what the person does goes to the worker.

import { Chart } from "./chart.js";
import { Board, grayscale } from "./drawing.js";

const PROVIDERS = { wasm: "WebAssembly", webgpu: "WebGPU" };
const element = (id) => document.getElementById(id);
const base = new URL("assets/", document.baseURI).href;

const lossChart = new Chart(element("loss-chart"), {
  log: true,
  format: (y) => Number(y.toPrecision(2)).toString(),
});
const accuracyChart = new Chart(element("accuracy-chart"), {
  min: 0,
  max: 1,
  ticks: [0, 0.5, 1],
  format: (y) => `${Math.round(1000 * y) / 10}%`,
});
const board = new Board(element("board"), element("overlay"), () => drawn());

let worker;
let manifest;
let losses = [];
let accuracies = [];
let reference = new Float32Array();
let running = false;
let stored = false;
let chosen = null; // the digit whose evidence is shown; null for the best one
let explained = null;
let question = 0;
let waiting = false;
let label = null;

// ---- the worker

function launch(provider) {
  worker?.terminate();
  setControls(false);
  setStatus("Loading …");
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => receive[data.type](data);
  worker.onerror = (event) => receive.error({ during: "load", message: event.message ?? "the worker did not start" });
  send({ type: "load", base, provider });
}

const send = (message) => worker.postMessage(message);

const receive = {
  ready(data) {
    manifest = data.manifest;
    reference = data.reference;
    stored = data.restored;
    element("test-count").textContent = manifest.test;
    element("provider").querySelector("[value=webgpu]").disabled = data.adapter === null;
    element("provider").querySelector("[value=auto]").textContent = data.adapter === null ? "automatic" : "the faster";
    element("backend").textContent = backendText(data);
    element("rate").value = String(manifest.learningRate);
    element("files").textContent = filesText();
    element("saved").textContent = "";
    setControls(true);
    setStatus(stored ? "Restored" : "Ready");
    document.body.dataset.provider = data.provider;
  },
  history(data) {
    losses = [...data.losses];
    accuracies = data.accuracies;
    if (stored && losses.length) element("saved").textContent = `Restored from this browser's storage: step ${data.steps}.`;
    else if (!losses.length) element("saved").textContent = "";
    showFigures();
  },
  losses(data) {
    losses.length = data.from;
    losses.push(...data.losses);
    element("speed").textContent = Math.round(data.rate).toLocaleString("en");
    showFigures();
    ask();
  },
  accuracy(data) {
    if (accuracies.at(-1)?.step === data.step) accuracies.pop();
    accuracies.push({ step: data.step, accuracy: data.accuracy });
    showFigures();
    ask();
  },
  running(data) {
    running = data.running;
    element("start").textContent = running ? "Pause" : losses.length ? "Continue" : "Start";
    element("provider").disabled = running;
    setStatus(running ? "Training" : "Paused", running ? "live" : "");
  },
  saved(data) {
    element("saved").textContent = `Saved in this browser at step ${data.steps}; a reload goes on from there.`;
    document.body.dataset.saved = data.steps;
  },
  explained(data) {
    waiting = false;
    if (data.id === question) {
      explained = data;
      showExplanation();
    } else if (!board.empty) {
      ask();
    }
  },
  sample(data) {
    board.setPicture(data.image);
    label = data.label;
    chosen = null;
    drawn();
  },
  warning: (data) => showAlert(data.message, false),
  error(data) {
    waiting = false;
    showAlert(data.during === "load" ? `The page could not start: ${data.message}` : `${data.message}`, true);
    if (data.during !== "load") return;
    setControls(false);
    element("provider").disabled = manifest === undefined;
    setStatus("Stopped", "bad");
  },
};

function backendText({ provider, trials, adapter, webgpuProblem, version }) {
  const speeds = Object.entries(trials).map(([name, rate]) => `${PROVIDERS[name]} ${Math.round(rate)} steps/s`);
  const gpu = adapter === null || webgpuProblem ? ` WebGPU is not used: ${webgpuProblem}.` : ` WebGPU adapter: ${adapter}.`;
  return `Running on ${PROVIDERS[provider]} (onnxruntime-web ${version}). Tried when the page opened: ${speeds.join(", ")}.${gpu}`;
}

function filesText() {
  const size = (name) => `${(manifest.files[name].bytes / 1024).toFixed(0)} KiB`;
  return (
    `Training step ${size("step.onnx")}, state ${size("step.checkpoint.safetensors")}, Grad-CAM ${size("explain.onnx")}; ` +
    `${manifest.parameters.toLocaleString("en")} parameters; ${manifest.train} training and ${manifest.test} test digits of 8×8 ` +
    `pixels (scikit-learn's copy of the UCI set), batches of ${manifest.batchSize}.`
  );
}

// ---- what is shown

function setControls(enabled) {
  for (const id of ["start", "reset", "rate", "provider", "clear", "sample"]) element(id).disabled = !enabled;
}

function setStatus(text, kind = "") {
  element("status").textContent = text;
  element("status").className = `pill ${kind}`;
}

function showAlert(message, error) {
  const alert = element("alert");
  alert.textContent = message.charAt(0).toUpperCase() + message.slice(1);
  alert.className = error ? "error" : "";
  alert.hidden = false;
}

function showFigures() {
  const steps = losses.length;
  const accuracy = accuracies.at(-1)?.accuracy;
  const smooth = losses.slice(-20).reduce((a, b) => a + b, 0) / Math.max(1, Math.min(20, steps));
  element("steps").textContent = steps.toLocaleString("en");
  element("epoch").textContent = (steps / manifest.stepsPerEpoch).toFixed(1);
  element("loss").textContent = steps ? smooth.toPrecision(3) : "–";
  element("accuracy").textContent = accuracy === undefined ? "–" : `${(100 * accuracy).toFixed(1)}%`;
  if (!steps) element("speed").textContent = "–";
  if (!running) element("start").textContent = steps ? "Continue" : "Start";
  const end = Math.max(reference.length, steps);
  lossChart.show(
    [
      { points: thinned(losses, end), color: "--series", label: "this page", width: 1.6 },
      { points: thinned(reference, end), color: "--reference", label: "Python", dash: [2, 4], width: 1.6 },
    ],
    end,
  );
  accuracyChart.show(
    [{ points: accuracies.map(({ step, accuracy: y }) => ({ x: step, y })), color: "--series", label: "accuracy" }],
    end,
  );
  element("loss-chart").ariaLabel = steps ? `Loss by step: ${losses[0].toFixed(2)} at first, now ${smooth.toPrecision(3)}` : "Loss by step; nothing yet";
  element("accuracy-chart").ariaLabel = accuracy === undefined ? "Test accuracy; nothing yet" : `Test accuracy: ${(100 * accuracy).toFixed(1)}% at step ${steps}`;
}

/** Means over as many steps as one pixel holds, so that long runs stay quick to draw; few steps are shown one by one. */
function thinned(values, end) {
  const size = Math.max(1, Math.round(end / 300));
  const points = [];
  for (let i = 0; i < values.length; i += size) {
    let sum = 0;
    const last = Math.min(values.length, i + size);
    for (let j = i; j < last; j++) sum += values[j];
    points.push({ x: i + (last - i) / 2, y: sum / (last - i) });
  }
  return points;
}

const digits = Array.from({ length: 10 }, (_, digit) => {
  const button = document.createElement("button");
  button.type = "button";
  button.disabled = true;
  button.innerHTML = `<span class="bar"><i></i></span><span>${digit}</span>`;
  button.ariaPressed = "false";
  button.addEventListener("click", () => {
    chosen = chosen === digit ? null : digit;
    ask();
  });
  element("digits").append(button);
  return button;
});

function showExplanation() {
  const { probabilities, best, digit, maps } = explained;
  const layer = document.querySelector("input[name=layer]:checked").value;
  const largest = board.showMap(layer === "" ? null : maps[Number(layer)]);
  document.body.dataset.map = layer === "" ? "none" : largest > 0 ? "shown" : "zero";
  digits.forEach((button, i) => {
    button.disabled = false;
    button.querySelector("i").style.height = `${100 * probabilities[i]}%`;
    button.ariaPressed = String(i === digit);
    button.ariaLabel = `${i}: ${(100 * probabilities[i]).toFixed(1)}%`;
  });
  const percent = (100 * probabilities[best]).toFixed(probabilities[best] > 0.995 ? 1 : 0);
  const truth = label === null ? "" : label === best ? ", rightly" : `; it is a ${label}`;
  const untrained = losses.length ? "" : " Untrained, it guesses.";
  const shown =
    layer === "" ? "" : largest > 0 ? ` Coloured: what speaks for ${digit}.` : ` Nothing in this layer speaks for ${digit}.`;
  element("answer").innerHTML = `It sees a <strong>${best}</strong> (${percent}%)${truth}.${shown}${untrained}`;
}

// ---- what the person does

function drawn() {
  const seen = element("seen").getContext("2d");
  seen.clearRect(0, 0, 8, 8);
  if (board.current) label = null;
  element("hint").hidden = !board.empty;
  if (board.empty) return;
  seen.drawImage(grayscale(board.image()), 0, 0);
  ask();
}

/** Ask for an explanation; while one is on its way, the newest question waits for it. */
function ask() {
  if (board.empty || !manifest) return;
  question++;
  if (waiting) return;
  waiting = true;
  send({ type: "explain", image: board.image(), digit: chosen, id: question });
}

element("start").addEventListener("click", () => send({ type: running ? "pause" : "start" }));
element("reset").addEventListener("click", () => {
  stored = false;
  element("alert").hidden = true;
  send({ type: "reset" });
  setStatus("Ready");
});
element("rate").addEventListener("change", (event) => send({ type: "learningRate", value: Number(event.target.value) }));
element("provider").addEventListener("change", (event) => launch(event.target.value));
element("clear").addEventListener("click", () => {
  board.clear();
  label = chosen = explained = null;
  question++;
  drawn();
  for (const button of digits) {
    button.disabled = true;
    button.ariaPressed = "false";
    button.querySelector("i").style.height = "0";
  }
  delete document.body.dataset.map;
  element("answer").textContent = "Draw a digit, or take one of the test set.";
});
element("sample").addEventListener("click", () => send({ type: "sample", index: Math.floor(Math.random() * manifest.test) }));
for (const input of document.querySelectorAll("input[name=layer]")) {
  input.addEventListener("change", () => explained && showExplanation());
}

// Tests drive the page through the same messages as the buttons.
globalThis.convgrad = {
  train: (until) => send({ type: "start", until }),
  get losses() {
    return losses;
  },
};

launch("auto");
