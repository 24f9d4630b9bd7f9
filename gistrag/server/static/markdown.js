// Markdown of a model or a document as elements. marked parses it, and DOMPurify lets through nothing but the tags below:
// no link, image, form, style or script. Markup that stands in a text is shown as text.
import { make, textNodes } from "./elements.js";

const SAFE = {
  ALLOWED_TAGS: ["p", "br", "hr", "h3", "h4", "h5", "h6", "strong", "em", "code", "pre", "blockquote", "ul", "ol", "li",
    "table", "thead", "tbody", "tr", "th", "td", "span"],
  ALLOWED_ATTR: ["start", "align", "title", "class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const START = "\uE000";  // private characters, to find the evidence again in what is rendered
const END = "\uE001";
const OPENING = /^\s*(?:(?:#{1,6}|[-*+]|\d{1,9}[.)]|>)\s+|\|\s*)*/;

const escaped = (text) => text.replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`);
const named = (text, address) => `<span class="reference" title="${escaped(address)}">${text}</span>`;
const renderer = {
  heading({ tokens, depth }) {  // below the headings of the page
    const tag = `h${Math.min(depth + 2, 6)}`;
    return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
  },
  link({ href, tokens }) { return named(this.parser.parseInline(tokens), href); },
  image({ href, text }) { return named(escaped(text || href), href); },
  checkbox({ checked }) { return checked ? "☑ " : "☐ "; },
  html({ text, block }) {
    if (/^<br\s*\/?>$/i.test(text.trim())) return "<br>";
    return block ? `<p class="raw">${escaped(text.trim())}</p>` : escaped(text);
  },
};
const tokenizer = { del: () => undefined };  // "9~18, 10~12" are ranges
const parser = new marked.Marked({ gfm: true, renderer, tokenizer });

export function safe(markup) {
  const home = make("div");
  home.append(DOMPurify.sanitize(markup, SAFE));
  for (const table of home.querySelectorAll("table")) {  // a wide one scrolls by itself
    const frame = make("div", undefined, "wide");
    table.replaceWith(frame);
    frame.append(table);
  }
  return home;
}

export const paragraphs = (text) => safe(parser.parse(text));
export const line = (text) => safe(parser.parseInline(text));

// Returns an answer: one line is never a heading or a list, as in "1986.", and a new line stays one.
export const answered = (text) => (text.trim().includes("\n") ? safe(parser.parse(text.trim(), { breaks: true })) : line(text.trim()));

// Returns a sentence, list item or table row without the marks of its block.
export function quotation(text) {
  const row = /^\s*\|/.test(text) ? text.trim().replace(/^\||(?<!\\)\|$/g, "").replace(/\s*(?<!\\)\|\s*/g, " · ") : text;
  return line(row.replace(OPENING, ""));
}

// Returns the text of a passage with the characters from first to last highlighted: as Markdown, where it is some.
export function passage(text, first, last, isMarkdown) {
  const characters = [...text];  // the server counts characters, not UTF-16 units
  const parts = [[0, first], [first, last], [last]].map((span) => characters.slice(...span).join(""));
  if (isMarkdown) {
    const plain = paragraphs(text);
    const home = last > first ? highlighted(...parts) : plain;
    if (home?.textContent === plain.textContent) return home;
  }
  const whole = make("p", undefined, "plain");
  whole.append(...(last > first ? [parts[0], make("mark", parts[1]), parts[2]] : [text]));
  const home = make("div");
  home.append(whole);
  return home;
}

// Returns nothing, or another text, where a border fell into the marks of a block or an address.
function highlighted(before, said, after) {
  const lead = said.match(/^\s*$|\n\s*$/.test(before) || !before ? OPENING : /^\s*/)[0];
  const opening = lead + said.slice(lead.length).match(/^[*_]*/)[0];
  const closing = said.slice(opening.length).match(/[\s|*_]*$/)[0];
  const middle = said.slice(opening.length, said.length - closing.length);
  const home = paragraphs(before + opening + START + middle + END + closing + after);
  if (![START, END].every((one) => home.textContent.includes(one))) return null;
  let isInside = false;
  for (const node of textNodes(home)) {
    const pieces = node.data.split(/([\uE000\uE001])/).map((piece) => {
      if (piece === START || piece === END) {
        isInside = piece === START;
        return "";
      }
      return isInside && piece.trim() ? make("mark", piece) : piece;
    });
    if (pieces.length > 1 || pieces[0] !== node.data) node.replaceWith(...pieces);
  }
  return home;
}
