// Messages from the page to the trainer; every failure goes back as a message of its own.

import { Trainer } from "./trainer.js";

const trainer = new Trainer((message) => self.postMessage(message));

const actions = {
  load: ({ base, provider }) => trainer.load(base, provider),
  start: ({ until }) => trainer.start(until),
  pause: () => trainer.pause(),
  reset: () => trainer.reset(),
  learningRate: ({ value }) => {
    trainer.learningRate = value;
  },
  explain: ({ image, digit, id }) => trainer.explain(image, digit, id),
  sample: ({ index }) => trainer.sample(index),
};

self.onmessage = async ({ data }) => {
  try {
    await actions[data.type](data);
  } catch (error) {
    self.postMessage({ type: "error", during: data.type, message: error?.message ?? String(error) });
  }
};
