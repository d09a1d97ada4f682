// Elements. Text goes in as text nodes: prompts, and what strangers' pictures say, are never markup.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function setOptions(select, pairs, first = null) {
  const all = first === null ? pairs : [["", first], ...pairs];
  select.replaceChildren(...all.map(([value, text]) => el("option", { value, textContent: text })));
}

export function later(call, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}

export function thumbnail(picture, url, open) {
  const words = picture.request?.prompt || "without a prompt";
  const image = el("img", { src: url, alt: words, loading: "lazy", decoding: "async" });
  return el("button", { type: "button", className: "picture", title: words, onclick: open }, image);
}
