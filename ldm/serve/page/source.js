// The picture to draw from, and its mask: chosen, dropped, pasted, sent from the gallery.

import { imageUrl, upload } from "./api.js";
import { Brush } from "./brush.js";
import { $, later } from "./dom.js";
import { field, save, setField } from "./form.js";

const KEY = "ldm.source";
const LARGEST = 1024; // pixels: larger pictures are drawn at this, unless the fields say another

export class Source {
  constructor(onFault) {
    this.onFault = onFault;
    this.image = null; // an upload's or a picture's id
    this.mask = null; // a data URL
    this.brush = new Brush(later(() => this.changed(), 100));
    $("undo").addEventListener("click", () => this.brush.undo());
    for (const kind of ["invert", "clear"]) $(kind).addEventListener("click", () => this.brush.add(kind));
    $("remove").addEventListener("click", () => this.remove());
    $("from").addEventListener("toggle", () => this.brush.ring()); // folded, it had no size
    $("file").addEventListener("change", () => this.take($("file")));
  }

  async take(input) {
    const file = input.files[0];
    input.value = ""; // so that the same file may be chosen again
    if (file) await this.useFile(file);
  }

  async useFile(file) {
    try {
      await this.set((await upload(file)).id);
    } catch (error) {
      this.onFault(error);
    }
  }

  // Show a picture, sized to draw; `mask` is a URL of one to begin with.
  async set(id, { mask = null, sized = true } = {}) {
    const [image, painted] = await Promise.all([loaded(imageUrl(id)), mask && loaded(mask)]);
    this.image = id;
    this.mask = null;
    $("source").src = image.src;
    $("stage").hidden = false;
    $("image-fields").disabled = false;
    $("from").open = true;
    this.brush.open(image.naturalWidth, image.naturalHeight, painted);
    if (sized) this.fitSize(image.naturalWidth, image.naturalHeight);
    this.changed();
  }

  fitSize(width, height) {
    const scale = Math.min(1, LARGEST / Math.max(width, height));
    for (const [name, side] of [["width", width], ["height", height]]) {
      setField(name, Math.max(8, Math.round((side * scale) / 8) * 8));
    }
    save();
  }

  remove() {
    this.image = this.mask = null;
    $("stage").hidden = true;
    $("source").removeAttribute("src");
    $("image-fields").disabled = $("mask-fields").disabled = true;
    localStorage.removeItem(KEY);
  }

  changed() {
    if (!this.image) return;
    this.mask = this.brush.toDataUrl();
    $("mask-fields").disabled = this.mask === null;
    try {
      localStorage.setItem(KEY, JSON.stringify({ image: this.image, mask: this.mask }));
    } catch {} // a mask too large to be kept
  }

  async resume() {
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(KEY));
    } catch {} // of another version of this page
    if (!kept?.image) return;
    const isOpen = $("from").open;
    try {
      await this.set(kept.image, { mask: kept.mask, sized: false });
    } catch {
      this.remove(); // the server has it no more
    }
    $("from").open = isOpen;
  }

  // The fields of a request; what the brush is at is in them too.
  collect() {
    if (!this.image) return {};
    this.changed();
    return { image: this.image, ...(this.mask && { mask_image: this.mask }) };
  }

  // What a restored request drew from, where the server still has it.
  async restore({ image, mask_image: mask }) {
    this.remove();
    if (!image) return true;
    try {
      await this.set(nameOf(image), { mask: mask && imageUrl(nameOf(mask)), sized: false });
    } catch {
      return false;
    }
    return true;
  }

  focusBrush() {
    $("mask").scrollIntoView({ block: "center" });
    $("mask").focus({ preventScroll: true });
  }
}

// uploads/SHA256.png stays SHA256.png, pictures/20261128/NAME.png is NAME.
function nameOf(path) {
  const name = path.split("/").at(-1);
  return path.startsWith("pictures/") ? name.replace(/\.png$/, "") : name;
}

function loaded(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image);
}
