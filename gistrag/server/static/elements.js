// Elements of the page. Text of a model or a document becomes text here; only markdown.js turns it into markup.

export const at = (selector, home = document) => home.querySelector(selector);

export function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

export function written(tag, text, className) {  // what people or documents wrote, in any direction
  const element = make(tag, text, className);
  element.dir = "auto";
  return element;
}

export function button(text, act, className = "quiet") {
  const element = make("button", text, className);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

// Returns a text with the phrases that stand in it as elements; a whole phrase ends where its last word does.
function picked(text, phrases, tag, { isWhole } = {}) {
  const patterns = phrases.filter((one) => one.trim()).map((one) => {
    const end = isWhole && /\p{L}$/u.test(one) ? "(?!\\p{L})" : "(?!\\p{N})";
    return one.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&") + end;
  });
  if (!patterns.length) return [text];
  const parts = text.split(new RegExp(`(?<![\\p{L}\\p{N}])(${patterns.join("|")})`, "iu"));
  return parts.map((part, place) => (place % 2 ? make(tag, part) : part));
}

export function textNodes(home) {
  const walker = document.createTreeWalker(home, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  return found;
}

// Makes elements of the phrases that stand in the texts below an element.
export function pick(home, phrases, tag, options) {
  for (const node of textNodes(home)) node.replaceWith(...picked(node.data, phrases, tag, options));
}
