// A mask painted over a picture. It is a list of operations, so that undo draws all but the last again.

import { $ } from "./dom.js";

const canvas = $("mask");
const context = canvas.getContext("2d", { willReadFrequently: true });
const paint = getComputedStyle(document.documentElement).getPropertyValue("--paint");

export class Brush {
  constructor(onChange) {
    this.onChange = onChange;
    this.operations = [];
    this.stroke = null;
    this.cursor = { x: 0, y: 0 };
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
    canvas.addEventListener("keydown", (event) => this.key(event));
    $("brush").addEventListener("input", () => this.ring());
  }

  // For a picture of that size, in its pixels; `mask` is one to begin with.
  open(width, height, mask = null) {
    [canvas.width, canvas.height] = [width, height];
    this.cursor = { x: width / 2, y: height / 2 };
    this.operations = mask ? [{ kind: "image", image: mask }] : [];
    this.redraw();
    this.ring();
  }

  get size() {
    return (Math.max(canvas.width, canvas.height) * Number($("brush").value)) / 100;
  }

  // --- strokes ---

  at(event) {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * canvas.width) / box.width,
      y: ((event.clientY - box.top) * canvas.height) / box.height,
    };
  }

  begin(event) {
    if (event.button > 0) return;
    canvas.setPointerCapture(event.pointerId);
    this.start(this.at(event));
  }

  start(point) {
    this.stroke = { kind: "stroke", size: this.size, erases: $("erase").checked, points: [point] };
    drawStroke(this.stroke, 0);
  }

  move(event) {
    this.cursor = this.at(event);
    this.ring();
    if (!this.stroke) return;
    this.stroke.points.push(this.cursor);
    drawStroke(this.stroke, this.stroke.points.length - 2); // the new piece alone: it must not lag
  }

  end() {
    if (!this.stroke) return;
    this.operations.push(this.stroke);
    this.stroke = null;
    this.redraw(); // as one line: its pieces overlapped, with harder edges
    this.onChange();
  }

  key(event) {
    const step = Math.max(1, this.size / 4);
    const [x, y] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key] ?? [0, 0];
    if (event.key === " ") {
      this.start({ ...this.cursor });
      this.end();
    } else if (!x && !y) return;
    event.preventDefault();
    this.cursor = {
      x: Math.min(Math.max(this.cursor.x + x, 0), canvas.width),
      y: Math.min(Math.max(this.cursor.y + y, 0), canvas.height),
    };
    this.ring();
  }

  ring() {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width ? box.width / canvas.width : 0;
    Object.assign($("ring").style, {
      left: `${this.cursor.x * scale}px`, top: `${this.cursor.y * scale}px`,
      width: `${this.size * scale}px`, height: `${this.size * scale}px`,
    });
  }

  // --- the whole mask ---

  add(kind) {
    this.operations.push({ kind });
    this.redraw();
    this.onChange();
  }

  undo() {
    this.operations.pop();
    this.redraw();
    this.onChange();
  }

  redraw() {
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const each of this.operations) draw(each);
  }

  get isEmpty() {
    if (!this.operations.length || !canvas.width) return true;
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let k = 3; k < data.length; k += 4) if (data[k]) return false;
    return true;
  }

  // A data URL of a PNG: white is painted, black is not; null without paint.
  toDataUrl() {
    if (this.isEmpty) return null;
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const over = copy.getContext("2d");
    over.drawImage(canvas, 0, 0);
    fill(over, "source-in", "#fff");
    fill(over, "destination-over", "#000");
    return copy.toDataURL("image/png");
  }
}

function fill(over, mode, colour) {
  over.globalCompositeOperation = mode;
  over.fillStyle = colour;
  over.fillRect(0, 0, over.canvas.width, over.canvas.height);
}

function draw(operation) {
  if (operation.kind === "stroke") drawStroke(operation, 0);
  else if (operation.kind === "invert") fill(context, "source-out", paint);
  else if (operation.kind === "clear") context.clearRect(0, 0, canvas.width, canvas.height);
  else if (operation.kind === "image") drawMask(operation.image);
}

function drawStroke({ size, erases, points }, from) {
  context.globalCompositeOperation = erases ? "destination-out" : "source-over";
  Object.assign(context, { strokeStyle: paint, lineWidth: size, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.moveTo(points[from].x, points[from].y);
  for (const { x, y } of points.slice(from)) context.lineTo(x, y);
  context.stroke();
}

// Of a black and white picture, what is white.
function drawMask(image) {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
  copy.drawImage(image, 0, 0, canvas.width, canvas.height);
  const pixels = copy.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < pixels.data.length; k += 4) pixels.data[k + 3] = pixels.data[k];
  copy.putImageData(pixels, 0, 0);
  fill(copy, "source-in", paint);
  context.globalCompositeOperation = "source-over";
  context.drawImage(copy.canvas, 0, 0);
}
