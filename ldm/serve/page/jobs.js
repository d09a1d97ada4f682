// This session's jobs, the newest first: where they stand, what they look like, what came of them.

import { Fault, get, imageUrl, post } from "./api.js";
import { $, el, thumbnail } from "./dom.js";

const KEY = "ldm.jobs";
const MOST = 40;
const EVERY = 2000; // milliseconds between looks at jobs that are not followed
const OVER = ["completed", "failed", "cancelled", "interrupted"];

const isOver = (told) => OVER.includes(told.status);

// `onPicture()` when some are finished, `open(id)` for one that is clicked, `onFault(error)`.
export class Jobs {
  constructor({ onPicture, open, onFault }) {
    Object.assign(this, { onPicture, open, onFault });
    this.told = new Map(); // id -> what the server said last; the oldest first
    this.cards = new Map();
    this.source = null;
    this.followed = null;
    this.said = "";
    setInterval(() => this.look(), EVERY);
  }

  get active() {
    return [...this.told.values()].filter((each) => !isOver(each));
  }

  // The pictures of a job that came last, and their request.
  get last() {
    return [...this.told.values()].filter((each) => each.pictures.length).at(-1) ?? null;
  }

  async resume() {
    let names = [];
    try {
      names = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
    } catch {} // of another version of this page
    for (const name of names) {
      try {
        this.show(await get(`/api/jobs/${encodeURIComponent(name)}`), false);
      } catch (error) {
        if (error.status !== 404) this.onFault(error); // 404: forgotten by the server, and here
      }
    }
    this.follow();
  }

  async ask(request) {
    this.show(await post("/api/jobs", request));
    this.follow();
  }

  async cancel(name) {
    try {
      this.show(await post(`/api/jobs/${encodeURIComponent(name)}/cancel`));
    } catch (error) {
      this.onFault(error);
    }
    this.follow();
  }

  // One stream at a time, of the job that is drawn first: browsers open six connections to a server at most.
  follow() {
    const next = this.active[0] ?? null;
    if ((next?.id ?? null) === this.followed) return;
    this.source?.close();
    [this.source, this.followed] = [null, next?.id ?? null];
    if (!next) return;
    const source = new EventSource(`/api/jobs/${encodeURIComponent(next.id)}/events?preview=true`);
    this.source = source;
    source.addEventListener("job", (event) => {
      this.show(JSON.parse(event.data));
      this.follow();
    });
    source.addEventListener("error", () => this.check(next.id));
  }

  async look() {
    const others = this.active.filter((each) => each.id !== this.followed).slice(0, 8);
    for (const each of others) await this.check(each.id);
    this.follow();
  }

  async check(name) {
    try {
      this.show(await get(`/api/jobs/${encodeURIComponent(name)}`));
    } catch (error) {
      if (!(error instanceof Fault) || error.status !== 404) return; // the server may come back
      this.show({ ...this.told.get(name), status: "interrupted", error: error.message });
    }
    this.follow();
  }

  // `isNews`: of what was there before a reload, the gallery knows.
  show(told, isNews = true) {
    const before = this.told.get(told.id);
    if (before && isOver(before)) return;
    this.told.set(told.id, told);
    this.forget();
    if (!this.cards.has(told.id)) this.cards.set(told.id, this.card(told));
    this.fill(this.cards.get(told.id), told);
    if (isNews && told.pictures.length > (before?.pictures.length ?? 0)) this.onPicture();
    $("nothing").hidden = this.told.size > 0;
    sessionStorage.setItem(KEY, JSON.stringify([...this.told.keys()]));
    this.summarize(told);
  }

  forget() {
    for (const [name, told] of this.told) {
      if (this.told.size <= MOST) return;
      if (!isOver(told)) continue;
      this.told.delete(name);
      this.cards.get(name)?.root.remove();
      this.cards.delete(name);
    }
  }

  card(told) {
    const words = told.request.prompt || "without a prompt";
    const state = el("span", { className: "hint" });
    const cancel = el("button", { type: "button", textContent: "Cancel", onclick: () => this.cancel(told.id) });
    cancel.setAttribute("aria-label", `Cancel: ${words}`);
    const bar = el("progress", { max: 1, value: 0 });
    bar.setAttribute("aria-label", `Progress: ${words}`);
    const [shown, fault] = [el("div", { className: "shown" }), el("p", { className: "fault" })];
    const preview = el("img", { className: "preview", alt: "Preview", hidden: true });
    shown.append(preview);
    const head = el("div", { className: "bar" }, el("p", { title: words, textContent: words }), cancel);
    const root = el("article", { className: "job" }, head, state, bar, fault, shown);
    root.dataset.job = told.id;
    $("jobs").prepend(root);
    return { root, state, cancel, bar, shown, preview, fault, count: 0 };
  }

  fill(card, told) {
    card.root.dataset.status = told.status;
    card.state.textContent = words(told);
    card.bar.value = told.progress;
    card.bar.hidden = card.cancel.hidden = isOver(told);
    card.fault.textContent = told.error && told.status !== "cancelled" ? told.error : "";
    if (told.preview) card.preview.src = told.preview;
    card.preview.hidden = isOver(told) || !card.preview.src;
    for (; card.count < told.pictures.length; card.count++) {
      const [id, index] = [told.pictures[card.count], card.count];
      const seeds = told.request.seeds ?? [];
      const picture = { id, request: { ...told.request, seeds: seeds.slice(index, index + 1) } };
      card.shown.append(thumbnail(picture, imageUrl(id), () => this.open(id)));
    }
  }

  // Beside the buttons, and for screen readers: these are told of changes of state and quarters, not each step.
  summarize(told) {
    const active = this.active;
    const first = active[0] ?? told;
    $("state").textContent = words(first) + (active.length > 1 ? `; ${active.length - 1} more` : "");
    $("progress").hidden = $("cancel").disabled = !active.length;
    $("progress").value = first.progress;
    const quarter = first.status === "generating" ? ` ${Math.floor(first.progress * 4) * 25} %` : "";
    const line = `${first.status}${quarter}${first.queue_position ? `, place ${first.queue_position + 1}` : ""}`;
    if (line !== this.said) $("live").textContent = this.said = line;
  }
}

export function words(told) {
  if (told.status === "queued") {
    return told.queue_position === null ? "waiting" : `waiting, place ${told.queue_position + 1} in the queue`;
  }
  if (told.status !== "generating") {
    const took = told.finished && told.started ? ` in ${(told.finished - told.started).toFixed(1)} s` : "";
    const hidden = told.flagged?.length ? `, ${told.flagged.length} black: flagged by the safety checker` : "";
    return told.status === "completed" ? `done${took}${hidden}` : told.status;
  }
  const left = told.eta === null ? "" : `, ${told.eta < 60 ? `${Math.ceil(told.eta)} s` : `${Math.ceil(told.eta / 60)} min`} left`;
  return `${Math.round(told.progress * 100)} %, step ${told.step} of ${told.steps || "?"}${left}`;
}
