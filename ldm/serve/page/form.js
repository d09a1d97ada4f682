// The form: its fields have the names of a Request's ("hires.strength": of the one within it).

import { $ } from "./dom.js";

const KEY = "ldm.form";
const KEPT_KEY = "ldm.extra";
// What pictures note of the server's own files, which no request may say again; and of words that change.
const NOTED = ["version", "model_hash", "image_sha256", "mask_image_sha256", "classifier_sha256",
  "hires_upscaler_sha256", "embeddings", "not_kept", "watermark", "drawn_as"];
const OF_MASKS = ["mask_invert", "mask_grow", "soft_mask", "extend"];

export const form = $("request");
let extra = {}; // settings of a restored picture that have no field here

const fields = () => [...form.elements].filter((each) => each.name);
export const field = (name) => fields().find((each) => each.name === name);

function valueOf(each) {
  if (each.type === "checkbox") return each.checked ? Number(each.value) : null;
  if (each.value === "") return null;
  return ["number", "range"].includes(each.type) ? Number(each.value) : each.value;
}

function place(request, path, value) {
  const [first, second] = path.split(".");
  if (second) request[first] = { ...request[first], [second]: value };
  else request[first] = value;
}

// The JSON of POST /api/jobs. Fields that are empty or disabled are left to the model.
export function collect() {
  const request = structuredClone(extra);
  for (const each of fields()) {
    const value = each.matches(":disabled") ? null : valueOf(each);
    if (value !== null) place(request, each.name, value);
  }
  return request;
}

export function setField(name, value) {
  const each = field(name);
  if (each.type === "checkbox") {
    each.checked = value !== null && value !== undefined;
    if (each.checked) each.value = value;
  } else {
    each.value = value ?? "";
    // A model or sampler that is not here: the select is left without a choice, which is no value.
    if (each.tagName === "SELECT" && each.selectedIndex < 0) each.value = "";
  }
  showOutputs();
}

export function showOutputs() {
  for (const output of form.querySelectorAll("output")) output.value = $(output.htmlFor.value).value;
}

export function setHires(on) {
  $("hires").checked = on;
  $("hires-fields").disabled = !on;
}

// Fill in a request as pictures and jobs tell it; what has no field is kept beside them.
export function restore(told) {
  const request = structuredClone(told);
  const without = request.image ? [] : OF_MASKS;
  for (const name of [...NOTED, "image", "mask_image", ...without]) delete request[name];
  const seeds = request.seeds ?? [];
  delete request.seeds;
  form.reset();
  setField("seed", seeds[0] ?? null);
  setField("n", Math.max(seeds.length, 1));
  setHires(Boolean(request.hires || request.hires_scale || request.hires_upscaler));
  for (const each of fields()) {
    const [first, second] = each.name.split(".");
    const value = second ? request[first]?.[second] : request[first];
    if (value === undefined) continue;
    setField(each.name, value);
    if (second) delete request[first][second];
    else delete request[first];
  }
  if (request.hires && !Object.keys(request.hires).length) delete request.hires;
  setExtra(request);
  save();
}

export function setExtra(value) {
  extra = value;
  $("more").hidden = Object.keys(extra).length === 0;
  $("extra").textContent = JSON.stringify(extra, null, 1);
  localStorage.setItem(KEPT_KEY, JSON.stringify(extra));
}

export function defaults() {
  form.reset();
  setHires(false);
  setExtra({});
  showOutputs();
  save();
}

// --- what outlives a reload ---

export function save() {
  const values = Object.fromEntries(fields().map((each) => [each.name, each.type === "checkbox" ? each.checked : each.value]));
  const open = [...form.querySelectorAll("details")].filter((each) => each.open).map((each) => each.id);
  localStorage.setItem(KEY, JSON.stringify({ values, open, hires: $("hires").checked }));
}

function kept(key) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? {};
  } catch {
    return {}; // of another version of this page
  }
}

export function load() {
  const { values = {}, open = [], hires = false } = kept(KEY);
  for (const each of fields()) {
    if (!(each.name in values)) continue;
    if (each.type === "checkbox") each.checked = values[each.name] === true;
    else setField(each.name, values[each.name]);
  }
  for (const id of open) if ($(id)) $(id).open = true;
  setHires(hires);
  setExtra(kept(KEPT_KEY));
  showOutputs();
}

// --- errors, where they belong ---

export function clearFaults() {
  $("fault").textContent = "";
  for (const each of form.querySelectorAll("small.fault")) each.remove();
  for (const each of fields()) each.removeAttribute("aria-invalid");
}

const PARAMS = { seeds: "seed", hires: "hires.strength" };

export function showFault(error) {
  clearFaults();
  const name = PARAMS[error.param] ?? error.param;
  const wrong = name && field(name);
  if (!wrong) {
    $("fault").textContent = error.message;
    return;
  }
  const note = Object.assign(document.createElement("small"), { className: "fault", textContent: error.message });
  note.setAttribute("role", "alert");
  wrong.setAttribute("aria-invalid", "true");
  wrong.closest("label").append(note); // within the label: it is read out with the field
  const folded = wrong.closest("details");
  if (folded) folded.open = true;
  wrong.focus();
}
