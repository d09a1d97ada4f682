// The public API. What goes wrong is a Fault, with the name of the field that is wrong where one is.

export class Fault extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Fault("The server does not answer: is it running?");
  }
  const body = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (answer.ok) return body;
  const error = body?.error ?? {};
  throw new Fault(error.message ?? `The server answered ${answer.status}.`, error.param ?? null, answer.status);
}

export const get = (path) => call(path);
export const remove = (path) => call(path, { method: "DELETE" });
export const post = (path, value) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value ?? {}) });

// {id, request}: the server reads what the picture says of itself.
export const upload = (file) =>
  call("/api/uploads", { method: "POST", headers: { "content-type": file.type || "image/png" }, body: file });

export const pictureUrl = (id) => `/api/pictures/${encodeURIComponent(id)}.png`;

export const thumbnailUrl = (id) => `/api/pictures/${encodeURIComponent(id)}/thumbnail`;

// Of an image's name as requests have it: an upload's, or a picture's.
export function imageUrl(id) {
  return /^[0-9a-f]{64}\.(png|jpg|webp)$/.test(id) ? `/api/uploads/${id}` : pictureUrl(id);
}
