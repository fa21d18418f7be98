// Line charts on a canvas: sharp on every screen, in the page's colours, with a read-out under the pointer.

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;

/** @typedef {{points: {x: number, y: number}[], color: string, dash?: number[], width?: number, label: string}} Series */

export class Chart {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{log?: boolean, min?: number, max?: number, format: (y: number) => string, ticks?: number[]}} options
   */
  constructor(canvas, options) {
    this.canvas = canvas;
    this.options = options;
    this.series = [];
    this.end = 1;
    this.pointer = null;
    this.pending = false;
    new ResizeObserver(() => this.redraw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => {
      this.pointer = event.offsetX;
      this.redraw();
    });
    canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  /** @param {Series[]} series @param {number} end last step on the axis */
  show(series, end) {
    this.series = series;
    this.end = Math.max(1, end);
    this.redraw();
  }

  redraw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.#draw();
    });
  }

  #range() {
    const { log, min, max } = this.options;
    if (min !== undefined && max !== undefined) return [min, max];
    let low = Infinity;
    let high = -Infinity;
    for (const { points } of this.series) {
      for (const { y } of points) {
        if (y < low) low = y;
        if (y > high) high = y;
      }
    }
    if (!(low <= high)) return log ? [0.001, 4] : [0, 1];
    return log ? [10 ** Math.floor(Math.log10(Math.max(low, 1e-6))), Math.max(4, high * 1.1)] : [low, high];
  }

  #ticks(low, high) {
    if (this.options.ticks) return this.options.ticks;
    const ticks = [];
    for (let e = Math.ceil(Math.log10(low) - 1e-9); 10 ** e <= high; e++) ticks.push(10 ** e);
    return ticks;
  }

  #draw() {
    const { canvas, options } = this;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    g.font = `11px ${style.fontFamily}`;
    const [low, high] = this.#range();
    const shape = options.log ? Math.log10 : (v) => v;
    const [a, b] = [shape(low), shape(high)];
    const px = (x) => LEFT + (x / this.end) * (width - LEFT - RIGHT);
    const py = (y) => TOP + (1 - (shape(Math.max(y, options.log ? low : -Infinity)) - a) / (b - a)) * (height - TOP - BOTTOM);

    g.fillStyle = color("--quiet");
    g.strokeStyle = color("--grid");
    g.lineWidth = 1;
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const tick of this.#ticks(low, high)) {
      g.beginPath();
      g.moveTo(LEFT, py(tick));
      g.lineTo(width - RIGHT, py(tick));
      g.stroke();
      g.fillText(options.format(tick), LEFT - 8, py(tick));
    }
    g.textBaseline = "alphabetic";
    const step = niceStep(this.end / Math.max(2, Math.floor(width / 110)));
    for (let x = 0; x <= this.end; x += step) {
      g.textAlign = x === 0 ? "left" : px(x) > width - 24 ? "right" : "center";
      g.fillText(x.toLocaleString("en"), px(x), height - 6);
    }

    for (const { points, color: name, dash, width: line } of this.series) {
      if (!points.length) continue;
      g.strokeStyle = g.fillStyle = color(name);
      g.lineWidth = line ?? 1.8;
      g.lineJoin = "round";
      g.setLineDash(dash ?? []);
      g.beginPath();
      points.forEach(({ x, y }, i) => (i ? g.lineTo(px(x), py(y)) : g.moveTo(px(x), py(y))));
      g.stroke();
      g.setLineDash([]);
      if (points.length === 1) g.fillRect(px(points[0].x) - 2, py(points[0].y) - 2, 4, 4);
    }
    if (this.pointer !== null && this.pointer >= LEFT) this.#readout(g, px, width, height, color);
  }

  #readout(g, px, width, height, color) {
    const x = ((this.pointer - LEFT) / (width - LEFT - RIGHT)) * this.end;
    const found = this.series
      .filter(({ points }) => points.length)
      .map(({ points, label }) => ({ label, point: points.reduce((p, q) => (Math.abs(q.x - x) < Math.abs(p.x - x) ? q : p)) }));
    if (!found.length) return;
    const at = found[0].point.x;
    const lines = [`step ${at.toLocaleString("en")}`, ...found.map(({ label, point }) => `${label} ${this.options.format(point.y)}`)];
    g.strokeStyle = color("--quiet");
    g.beginPath();
    g.moveTo(px(at), TOP);
    g.lineTo(px(at), height - BOTTOM);
    g.stroke();
    const box = Math.max(...lines.map((line) => g.measureText(line).width)) + 16;
    const left = Math.min(px(at) + 8, width - box - 2);
    g.fillStyle = color("--card");
    g.strokeStyle = color("--line");
    g.beginPath();
    g.roundRect(left, TOP, box, 16 * lines.length + 8, 6);
    g.fill();
    g.stroke();
    g.fillStyle = color("--ink");
    g.textAlign = "left";
    lines.forEach((line, i) => g.fillText(line, left + 8, TOP + 16 * (i + 1)));
  }
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) ?? power;
}
