// node try_models.mjs MODELS RUNTIME: whether a runtime (see runtime.mjs) can load each model.
// MODELS is a JSON array of base64 texts; prints a JSON array with null for yes, or the error message.

import { readFileSync } from "node:fs";
import { runtime } from "./runtime.mjs";

const { ort, options } = await runtime(process.argv[3]);
ort.env.logLevel = "fatal";
const answers = [];
for (const text of JSON.parse(readFileSync(process.argv[2], "utf8"))) {
  try {
    const model = new Uint8Array(Buffer.from(text, "base64"));
    const session = await ort.InferenceSession.create(model, { ...options, graphOptimizationLevel: "disabled" });
    await session.release();
    answers.push(null);
  } catch (error) {
    answers.push(String(error?.message ?? error));
  }
}
process.stdout.write(JSON.stringify({ version: ort.env.versions.web, answers }), () => process.exit(0));
