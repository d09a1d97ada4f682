// One picture, what it says of itself, and what can be done with it.

import { get, imageUrl, remove } from "./api.js";
import { $, el } from "./dom.js";

const dialog = $("viewer");
const TOO_LONG = ["version", "model_hash", "image_sha256", "mask_image_sha256"];

// `actions`: use(request), seed(request), image(id), inpaint(id), deleted(id); `neighbour(id, offset)`.
export class Viewer {
  constructor(actions, neighbour) {
    Object.assign(this, { actions, neighbour });
    this.picture = null;
    $("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // the backdrop
      const action = event.target.dataset?.do;
      if (action) this.act(action);
    });
    dialog.addEventListener("keydown", (event) => {
      const offset = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const next = offset && this.neighbour(this.picture.id, offset);
      if (next) this.open(next);
    });
  }

  async open(id) {
    try {
      this.picture = await get(`/api/pictures/${encodeURIComponent(id)}`);
    } catch (error) {
      this.picture = { id, request: null };
      this.show();
      $("said").textContent = error.message;
      return;
    }
    this.show();
  }

  show() {
    const { id, request, width, height, created } = this.picture;
    $("large").src = $("download").href = imageUrl(id);
    $("large").alt = request?.prompt ?? "Picture";
    $("download").download = `${id}.png`;
    const rows = Object.entries(request ?? {}).filter(([name]) => !TOO_LONG.includes(name));
    if (width) rows.push(["size", `${width} × ${height}`], ["drawn", new Date(created * 1000).toLocaleString()]);
    $("metadata").replaceChildren(...rows.flatMap(([name, value]) => [
      el("dt", { textContent: name.replaceAll("_", " ") }), el("dd", { textContent: plain(value) })]));
    const flagged = request?.nsfw_content_detected ? "A safety checker flagged it: it is black." : "";
    $("said").textContent = request ? flagged : "It does not say how it was drawn.";
    for (const name of ["use", "seed", "copy"]) dialog.querySelector(`[data-do=${name}]`).disabled = !request;
    this.disarm();
    if (!dialog.open) dialog.showModal();
  }

  async act(action) {
    const { id, request } = this.picture;
    if (action === "copy") return this.copy(JSON.stringify(request, null, 2));
    if (action === "delete") return this.remove(id);
    this.actions[action](action === "use" || action === "seed" ? request : id);
    dialog.close();
  }

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text); // absent on plain http from another machine
      $("said").textContent = "Copied.";
    } catch {
      const area = el("textarea", { value: text, rows: 8, readOnly: true });
      area.setAttribute("aria-label", "Settings");
      $("said").replaceChildren("The browser does not let this page copy: press Ctrl+C.", area);
      area.select();
    }
  }

  // The first press asks, the second deletes.
  async remove(id) {
    const button = dialog.querySelector("[data-do=delete]");
    if (!this.isArmed) {
      this.isArmed = true;
      button.textContent = "Really delete?";
      return;
    }
    this.disarm();
    try {
      await remove(`/api/pictures/${encodeURIComponent(id)}`);
    } catch (error) {
      if (error.status !== 404) {
        $("said").textContent = error.message;
        return;
      }
    }
    this.actions.deleted(id);
    dialog.close();
  }

  disarm() {
    this.isArmed = false;
    dialog.querySelector("[data-do=delete]").textContent = "Delete";
  }
}

function plain(value) {
  if (Array.isArray(value) && value.every((each) => typeof each !== "object")) return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
