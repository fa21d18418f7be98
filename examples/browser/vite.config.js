import { defineConfig } from "vite";

export default defineConfig({
  base: "./", // the built page works from any folder of any server
  publicDir: process.env.CONVGRAD_PUBLIC ?? "public",
  worker: { format: "es" },
  build: { target: "es2022", assetsInlineLimit: 0, chunkSizeWarningLimit: 2000 },
  preview: { host: "127.0.0.1", port: 4173 },
});
