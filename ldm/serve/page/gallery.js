// All pictures of the server, the newest first, as far as one scrolls.

import { get, thumbnailUrl } from "./api.js";
import { $, later, thumbnail } from "./dom.js";

const PAGE = 40;

export class Gallery {
  constructor({ open, onFault }) {
    Object.assign(this, { open, onFault });
    this.refresh = later(() => this.readNew(), 200); // pictures of a batch come together
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    this.reset();
    new IntersectionObserver((seen) => {
      this.isAtEnd = seen.at(-1).isIntersecting;
      if (this.isAtEnd) this.more();
    }, { rootMargin: "600px" }).observe($("end"));
    $("search").addEventListener("input", later(() => { this.reset(); this.more(); }, 300));
  }

  reset() {
    this.shown = new Map(); // id -> {picture, button}
    this.next = null;
    this.isWhole = false;
    this.round = (this.round ?? 0) + 1; // what was asked before is not shown any more
    this.isAsking = false;
    $("pictures").replaceChildren();
    $("end").textContent = "";
  }

  get ids() {
    return [...$("pictures").children].map((each) => each.dataset.picture);
  }

  query() {
    return new URLSearchParams({ limit: PAGE, search: $("search").value.trim() });
  }

  tellEnd() {
    $("end").textContent = this.isWhole ? (this.shown.size ? "That is all." : "No pictures.") : "";
  }

  async more() {
    if (this.isAsking || this.isWhole) return;
    const round = this.round;
    this.isAsking = true;
    const asked = this.query();
    if (this.next !== null) asked.set("before", this.next);
    try {
      const page = await get(`/api/pictures?${asked}`);
      if (round !== this.round) return;
      for (const each of page.pictures) this.add(each, false);
      this.next = page.next;
      this.isWhole = page.next === null;
      this.tellEnd();
    } catch (error) {
      if (round !== this.round) return;
      this.isWhole = true; // or scrolling would ask again and again
      $("end").textContent = error.message;
    }
    this.isAsking = false;
    // The observer tells of changes only, and a short page leaves the end where it was.
    if (this.isAtEnd) requestAnimationFrame(() => this.isAtEnd && this.more());
  }

  add(picture, isNew) {
    if (this.shown.has(picture.id)) return;
    const button = thumbnail(picture, thumbnailUrl(picture.id), () => this.open(picture.id));
    button.dataset.picture = picture.id;
    this.shown.set(picture.id, { picture, button });
    if (isNew) $("pictures").prepend(button);
    else $("pictures").append(button);
  }

  // What came since, from here or from other programs.
  async readNew() {
    if (this.isAsking) return this.refresh();
    const round = this.round;
    try {
      const page = await get(`/api/pictures?${this.query()}`);
      if (round !== this.round) return;
      const fresh = page.pictures.filter((each) => !this.shown.has(each.id));
      if (fresh.length === PAGE) { // there may be more between: begin again
        this.reset();
        return this.more();
      }
      for (const each of fresh.reverse()) this.add(each, true);
      this.tellEnd();
    } catch (error) {
      this.onFault(error);
    }
  }

  forget(id) {
    this.shown.get(id)?.button.remove();
    this.shown.delete(id);
  }

  // The one before or after another, for the arrow keys; null at the ends.
  neighbour(id, offset) {
    const ids = this.ids;
    const at = ids.indexOf(id);
    return at < 0 ? null : ids[at + offset] ?? null;
  }
}
