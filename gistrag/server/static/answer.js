// An answer as it is shown: its text, how sure it is, the sentence it rests on, its sources and what it cost.
import { at, make, pick, written } from "./elements.js";
import { answered, line, quotation } from "./markdown.js";
import { words } from "./words.js";

const CELLS = 48;

export const passageLink = (index, source) => `#passage/${encodeURIComponent(index)}/${source.chunk_id}`;

// Shows everything about a complete answer below its question, and returns what to read out.
export function showAnswer(entry, { text, details, index }, isMarkdown) {
  const { verdict, unsupported, sources, withheld } = details;
  const quoted = sources.find((one) => one.evidence && (verdict !== "not found" || withheld));
  const evidenceLink = quoted && `${passageLink(index, quoted)}/${quoted.evidence.start}-${quoted.evidence.end}`;
  const shown = at(".answer", entry);
  showText(shown, text, unsupported);
  if (quoted && verdict !== "not found") cite(shown, sources.indexOf(quoted) + 1, evidenceLink);
  if (verdict) entry.dataset.verdict = verdict;
  const belief = [...verdictLine(details, quoted), ...evidence({ text, details }, quoted, evidenceLink, isMarkdown)];
  if (verdict === "unsure" && quoted) shown.before(...belief, make("p", words.modelAnswers, "note"));
  else shown.after(...belief);
  if (unsupported.length) entry.append(make("p", words.unsupported(unsupported.join(", ")), "note"));
  if (sources.length) entry.append(sourceList(sources, index, isMarkdown), cost(details));
  const told = [...entry.querySelectorAll(".searched, .answer, .verdict, blockquote, .note")].map((one) => one.textContent);
  return [...told, sources.length ? `${words.sources(sources.length)}.` : ""].join(" ");
}

function showText(shown, text, unsupported) {
  shown.replaceChildren(...answered(text.trim() ? text : words.nothing).childNodes);
  shown.classList.add("rendered");
  pick(shown, unsupported, "u", { isWhole: true });
  for (const one of shown.querySelectorAll("u")) one.title = words.inNoPassage;
}

// Puts the number of the source that carries an answer behind its last word.
function cite(shown, number, address) {
  const link = make("a", `[${number}]`, "cite");
  link.href = address;
  link.ariaLabel = words.openSource(number);
  let home = shown;
  while (/^(P|UL|OL|LI|BLOCKQUOTE)$/.test(home.lastElementChild?.tagName) && !home.lastElementChild.nextSibling?.data?.trim()) home = home.lastElementChild;
  home.append("\u00a0", link);
}

// Returns how sure the answer is, if that is known.
function verdictLine({ confidence, verdict, withheld }, quoted) {
  if (!["answered", "unsure", "not found"].includes(verdict)) return [];
  const shown = make("p", words[verdict], "verdict");
  if (confidence) {
    shown.title = words.likely(Math.round(100 * confidence));
    shown.append(make("span", ` ${shown.title}.`, "unseen"));
  }
  if (verdict === "unsure" && quoted) shown.append(` ${words.passageSays}`);
  if (withheld) shown.append(` ${quoted ? words.guessedFrom(withheld) : words.guessed(withheld)}`);
  return [shown];
}

// Returns the sentence that carries the answer, with a link to its passage.
function evidence({ text, details }, source, address, isMarkdown) {
  if (!source) return [];
  const answer = (details.withheld || text).trim();
  const phrases = [answer.replace(/[.!?]+$/, ""), ...(answer.match(/\d[\d.,:]*\d|\d/g) ?? [])];
  const sentence = details.quote || source.evidence.text;
  const said = written("blockquote", isMarkdown(source.path) ? undefined : sentence);
  if (isMarkdown(source.path)) said.append(...quotation(sentence).childNodes);
  pick(said, phrases, "b");
  const place = written("a", source.place);
  place.href = address;
  const caption = make("figcaption");
  caption.append(place, make("span", source.as_text ? words.asText : words.asGists, "how"));
  const figure = make("figure", undefined, "evidence");
  figure.append(said, caption);
  return [figure];
}

// Returns the sources, folded to one line that names them.
function sourceList(sources, index, isMarkdown) {
  const list = make("ol", undefined, "sources");
  for (const source of sources) {
    const link = make("a");
    link.href = passageLink(index, source);
    const snippet = written("span", undefined, "snippet");
    snippet.append(...(isMarkdown(source.path) ? beginning(source.snippet) : [source.snippet]));
    link.append(written("span", source.place, "place"), snippet, make("span", source.as_text ? words.asText : words.asGists, "how"));
    const item = make("li");
    item.append(link);
    list.append(item);
  }
  const line = written("summary", `${words.sources(sources.length)}: ${sources.map((one) => one.place).join(" · ")}`);
  const fold = make("details", undefined, "others");
  fold.append(line, list);
  return fold;
}

// Returns how a passage begins, without the marks of Markdown blocks, which its one line has lost.
const beginning = (snippet) => line(snippet.replace(/(^|\s)(?:#{1,6}|[-*+]|>)(?=\s)|\|(?:[\s|:-]*\|)?/g, "$1")).childNodes;

function cost({ timings, usage }) {
  const shown = make("div", undefined, "cost");
  const stoodFor = usage.source_tokens + usage.text_tokens;
  if (usage.gist_slots) {
    const cells = make("div", undefined, "cells");
    const filled = Math.ceil((CELLS * (usage.gist_slots + usage.text_tokens)) / stoodFor);
    cells.style.setProperty("--share", `${(100 * filled) / CELLS}%`);
    cells.setAttribute("aria-hidden", "true");
    shown.append(cells);
  }
  for (const [value, told] of costs(timings, usage)) {
    const part = make("span");
    part.append(make("b", value), ` ${told}`);
    shown.append(part, " ");
  }
  return shown;
}

function costs(timings, usage) {
  const parts = [[words.seconds(timings.ttft_s), words.firstWord], [words.seconds(timings.total_s), words.total]];
  if (usage.gist_slots) parts.push([words.gistTokens(usage.gist_slots), words.standFor(usage.source_tokens)]);
  if (usage.readings > 1) parts.push(words.readings(usage.readings));
  if (usage.text_tokens) parts.push(words.tokensAsText(usage.text_tokens));
  if (usage.text_pending) parts.push(words.pendingAsText(usage.text_pending));
  if (usage.text_fallbacks) parts.push(words.unusable(usage.text_fallbacks));
  if (usage.dropped_chunks) parts.push(words.leftOut(usage.dropped_chunks));
  return parts;
}
