// The page's beginning: lists from the server, state from before, buttons and keys.

import { get, upload } from "./api.js";
import { $, later, setOptions } from "./dom.js";
import { clearFaults, collect, defaults, field, form, load, restore, save, setExtra, setField, setHires, showFault, showOutputs } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { Source } from "./source.js";
import { Viewer } from "./viewer.js";
import { onWeightKeys } from "./weights.js";

const source = new Source(showFault);
const gallery = new Gallery({ open: (id) => viewer.open(id), onFault: showFault });
const jobs = new Jobs({
  onPicture: () => gallery.refresh(), open: (id) => viewer.open(id), onFault: showFault,
});
const viewer = new Viewer({
  use: restoreRequest,
  seed: (request) => { setField("seed", request.seeds?.[0] ?? null); save(); },
  image: (id) => send(id, false),
  inpaint: (id) => send(id, true),
  deleted: (id) => gallery.forget(id),
}, (id, offset) => gallery.neighbour(id, offset));

async function send(id, paints) {
  try {
    await source.set(id);
    if (paints) source.focusBrush();
    else $("from").scrollIntoView({ block: "nearest" });
  } catch {
    say("That picture cannot be shown: it may be deleted.");
  }
}

const say = (words) => showFault({ message: words });

async function generate() {
  clearFaults();
  try {
    await jobs.ask({ ...collect(), ...source.collect() });
  } catch (error) {
    showFault(error);
  }
}

async function restoreRequest(request) {
  clearFaults();
  restore(request);
  const isWhole = await source.restore(request);
  if (request.model && field("model").value !== request.model) {
    say(`The server has no model ${request.model}: the one chosen here draws.`);
  } else if (!isWhole) say("The picture that this was drawn from is not on this server.");
  else $("live").textContent = "Settings restored.";
}

// Of a dropped picture: its settings, or where it has none the picture itself.
async function restoreFile(file) {
  try {
    const { id, request } = await upload(file);
    if (request) return await restoreRequest(request);
    await source.set(id);
    say("This picture does not say how it was drawn: it is now the one to draw from.");
  } catch (error) {
    showFault(error);
  }
}

function listen() {
  form.addEventListener("submit", (event) => { event.preventDefault(); generate(); });
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== "Enter" || $("viewer").open) return;
    event.preventDefault();
    generate();
  });
  form.addEventListener("input", later(save, 200));
  form.addEventListener("input", showOutputs);
  for (const each of form.querySelectorAll("details")) each.addEventListener("toggle", save);
  for (const each of form.querySelectorAll("textarea")) onWeightKeys(each);
  $("cancel").addEventListener("click", () => jobs.active[0] && jobs.cancel(jobs.active[0].id));
  $("hires").addEventListener("change", () => setHires($("hires").checked));
  $("drop-extra").addEventListener("click", () => setExtra({}));
  $("defaults").addEventListener("click", () => { clearFaults(); source.remove(); defaults(); });
  $("swap").addEventListener("click", swap);
  $("dice").addEventListener("click", () => { setField("seed", null); save(); });
  $("reuse").addEventListener("click", reuse);
  $("lora").addEventListener("change", addLora);
  $("settings-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) restoreFile(file);
  });
}

function swap() {
  const [width, height] = [field("width").value, field("height").value];
  setField("width", height);
  setField("height", width);
  save();
}

function reuse() {
  const seeds = jobs.last?.request.seeds;
  if (!seeds) return;
  setField("seed", seeds[0]);
  save();
}

function addLora() {
  const area = field("prompt");
  area.value = `${area.value.trimEnd()} <lora:${$("lora").value}:1>`.trimStart();
  $("lora").value = "";
  area.focus();
  save();
}

const pictureIn = (data) => [...(data?.files ?? [])].find((each) => each.type.startsWith("image/"));

function listenToDrops() {
  const drag = (on) => document.body.classList.toggle("dragged", on);
  document.addEventListener("dragover", (event) => { event.preventDefault(); drag(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drag(false); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drag(false);
    clearFaults();
    const file = pictureIn(event.dataTransfer);
    if (!file) say("Drop a PNG, JPEG or WebP picture.");
    else if ($("zone").contains(event.target)) source.useFile(file);
    else restoreFile(file);
  });
  document.addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (!file) return; // a text, for the field that has the focus
    event.preventDefault();
    source.useFile(file);
  });
}

async function fillLists() {
  const [limits, models] = await Promise.all([get("/api/limits"), get("/api/models")]);
  setOptions(field("model"), models.models.flatMap((each) => [[each, each],
    ...models.vaes.map((vae) => [`${each}/${vae}`, `${each}, VAE ${vae}`])]));
  field("model").value = models.default;
  setOptions(field("sampler"), Object.entries(limits.samplers), "model's");
  setOptions(field("spacing"), limits.spacings.map((each) => [each, each.replaceAll("_", " ")]), "model's");
  setOptions(field("hires_upscaler"), Object.entries(limits.upscalers), "model's");
  setOptions($("lora"), models.loras.map((each) => [each, each]), "choose");
  $("lora-row").hidden = !models.loras.length;
  field("n").max = limits.pictures;
  field("num_inference_steps").max = limits.steps;
  for (const name of ["width", "height"]) field(name).max = limits.side;
}

async function start() {
  listen();
  listenToDrops();
  try {
    await fillLists();
  } catch (error) {
    showFault(error);
    return; // what was kept from before stays so: without the lists, it would be lost
  }
  load();
  addEventListener("pagehide", save);
  await source.resume();
  await jobs.resume();
  document.documentElement.dataset.ready = "true"; // for those who drive this page by a program
}

start();
