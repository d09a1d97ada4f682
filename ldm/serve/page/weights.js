// Ctrl+Up and Ctrl+Down on a text: (words:1.1), as AUTOMATIC1111's page does it.

const STEP = 0.1;
const WEIGHT = /^:(-?\d*\.?\d+)\)/;

// What to weigh: the selection; without one the brackets around the caret, or else its word.
function chosen(text, start, end) {
  if (start !== end) {
    while (start < end && text[start] === " ") start++;
    while (end > start && text[end - 1] === " ") end--;
    return [start, end];
  }
  const open = text.lastIndexOf("(", start - 1);
  const close = text.indexOf(")", start);
  const inner = open >= 0 && close > open ? text.slice(open + 1, close) : ")";
  const weighed = /^([^()]*):-?\d*\.?\d+$/.exec(inner);
  if (weighed) return [open + 1, open + 1 + weighed[1].length];
  const isEdge = (letter) => letter === undefined || /[\s,()[\]<>:]/.test(letter);
  while (!isEdge(text[start - 1])) start--;
  while (!isEdge(text[end])) end++;
  return [start, end];
}

// {text, start, end} of the part to replace and by what, and where the selection is then.
export function weighed(text, from, to, up) {
  const [start, end] = chosen(text, from, to);
  if (start === end) return null;
  const words = text.slice(start, end);
  const old = text[start - 1] === "(" ? WEIGHT.exec(text.slice(end)) : null;
  const weight = Math.round(((old ? Number(old[1]) : 1) + (up ? STEP : -STEP)) * 100) / 100;
  const begin = old ? start - 1 : start;
  const stop = old ? end + old[0].length : end;
  const isPlain = weight === 1;
  const caret = begin + (isPlain ? 0 : 1);
  return {
    begin, stop, text: isPlain ? words : `(${words}:${weight})`, start: caret, end: caret + words.length,
  };
}

export function onWeightKeys(area) {
  area.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    const change = weighed(area.value, area.selectionStart, area.selectionEnd, event.key === "ArrowUp");
    if (!change) return;
    area.setSelectionRange(change.begin, change.stop);
    // Deprecated, and the one way that Ctrl+Z undoes; where it is gone, the text changes without.
    if (!document.execCommand?.("insertText", false, change.text)) {
      area.setRangeText(change.text);
      area.dispatchEvent(new Event("input", { bubbles: true }));
    }
    area.setSelectionRange(change.start, change.end);
  });
}
