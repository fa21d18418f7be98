// Drawing a digit, what the network gets of it, and the map over it.
//
// The training images are 32x32 bitmaps of pen strokes, scaled to the digit's box, of which each pixel counts the ink in a
// 4x4 block. A drawing is treated the same way: its strokes are scaled to the box and drawn anew with the data's pen.

const GRID = 8;
const FINE = 64; // samples a side that are averaged to GRID
const PEN = 0.135; // width of the data's pen, in image sides
const BOARD_PEN = 0.07; // what the person sees, in board sides
const INK = "#c3cad4"; // short of white, so that the map's colours show on it

export class Board {
  /** @param {HTMLCanvasElement} canvas @param {HTMLCanvasElement} overlay @param {() => void} changed */
  constructor(canvas, overlay, changed) {
    this.canvas = canvas;
    this.overlay = overlay;
    this.changed = changed;
    this.strokes = [];
    this.picture = null;
    this.current = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (this.picture) this.clear();
      canvas.setPointerCapture(event.pointerId);
      this.current = [this.#point(event)];
      this.strokes.push(this.current);
      this.#paint();
      changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.current) return;
      for (const each of event.getCoalescedEvents?.() ?? [event]) this.current.push(this.#point(each));
      this.#paint();
      changed();
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.current = null));
    this.#paint();
  }

  get empty() {
    return !this.strokes.length && !this.picture;
  }

  clear() {
    this.strokes = [];
    this.picture = null;
    this.#paint();
    this.showMap(null);
  }

  /** Show an 8x8 image in place of a drawing. @param {Float32Array} image values in [0, 1] */
  setPicture(image) {
    this.clear();
    this.picture = image;
    this.#paint();
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  #paint() {
    const { canvas } = this;
    const g = canvas.getContext("2d");
    g.clearRect(0, 0, canvas.width, canvas.height);
    if (this.picture) {
      g.imageSmoothingEnabled = true;
      g.drawImage(grayscale(this.picture), 0, 0, canvas.width, canvas.height);
      return;
    }
    drawStrokes(g, this.strokes, (p) => ({ x: p.x * canvas.width, y: p.y * canvas.height }), BOARD_PEN * canvas.width, INK);
  }

  /** The square of the board that becomes the network's image, in board sides. */
  get frame() {
    if (this.picture || !this.strokes.length) return { x: 0, y: 0, side: 1 };
    const points = this.strokes.flat();
    const [x0, x1] = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
    const [y0, y1] = [Math.min(...points.map((p) => p.y)), Math.max(...points.map((p) => p.y))];
    const inner = Math.max(x1 - x0, y1 - y0, 0.02);
    const side = inner / (1 - PEN); // half a pen of room on every side
    return { x: (x0 + x1 - side) / 2, y: (y0 + y1 - side) / 2, side };
  }

  /** @returns {Float32Array} 64 values in [0, 1] */
  image() {
    if (this.picture) return this.picture;
    const { x, y, side } = this.frame;
    const fine = new OffscreenCanvas(FINE, FINE);
    const g = fine.getContext("2d", { willReadFrequently: true });
    drawStrokes(g, this.strokes, (p) => ({ x: ((p.x - x) / side) * FINE, y: ((p.y - y) / side) * FINE }), PEN * FINE);
    const { data } = g.getImageData(0, 0, FINE, FINE);
    const block = FINE / GRID;
    const image = new Float32Array(GRID * GRID);
    for (let i = 0; i < FINE * FINE; i++) {
      const at = Math.floor(i / FINE / block) * GRID + Math.floor((i % FINE) / block);
      image[at] += data[4 * i + 3] / 255 / (block * block);
    }
    return image.map((v) => Math.round(v * 16) / 16); // as the data: counts of 16
  }

  /** @param {{shape: number[], values: Float32Array} | null} map @returns {number} its largest value */
  showMap(map) {
    const { overlay } = this;
    const g = overlay.getContext("2d");
    g.clearRect(0, 0, overlay.width, overlay.height);
    const largest = map ? Math.max(...map.values) : 0;
    if (!map || !(largest > 0)) return 0;
    const [h, w] = map.shape;
    const heat = new OffscreenCanvas(w, h);
    const pixels = new ImageData(w, h);
    map.values.forEach((value, i) => pixels.data.set(heatColor(value / largest), 4 * i));
    heat.getContext("2d").putImageData(pixels, 0, 0);
    const { x, y, side } = this.frame;
    g.imageSmoothingEnabled = true;
    g.imageSmoothingQuality = "high";
    g.drawImage(heat, x * overlay.width, y * overlay.height, side * overlay.width, side * overlay.height);
    g.strokeStyle = "rgb(255 255 255 / 25%)"; // the map ends where the network's image does
    g.lineWidth = 2;
    g.strokeRect(x * overlay.width, y * overlay.height, side * overlay.width, side * overlay.height);
    return largest;
  }
}

function drawStrokes(g, strokes, place, pen, ink = "#ffffff") {
  g.strokeStyle = g.fillStyle = ink;
  g.lineWidth = pen;
  g.lineCap = g.lineJoin = "round";
  for (const stroke of strokes) {
    const points = stroke.map(place);
    g.beginPath();
    if (points.length === 1) {
      g.arc(points[0].x, points[0].y, pen / 2, 0, 2 * Math.PI);
      g.fill();
      continue;
    }
    points.forEach((p, i) => (i ? g.lineTo(p.x, p.y) : g.moveTo(p.x, p.y)));
    g.stroke();
  }
}

/** An 8x8 image as a canvas. @param {Float32Array} image */
export function grayscale(image) {
  const canvas = new OffscreenCanvas(GRID, GRID);
  const pixels = new ImageData(GRID, GRID);
  image.forEach((value, i) => pixels.data.set([255, 255, 255, Math.round(255 * value)], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** Transparent through amber to red: readable over black and over white ink. */
function heatColor(t) {
  return [255, Math.round(190 * (1 - t) + 40 * t), Math.round(40 * (1 - t)), Math.round(215 * Math.min(1, 1.15 * t))];
}
