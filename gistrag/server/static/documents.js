// The chosen index: its totals, its documents, and what one may ask about them.
import { newChat } from "./chats.js";
import { at, button, make } from "./elements.js";
import { showChat } from "./history.js";
import { get } from "./server.js";
import { state } from "./state.js";
import { ask } from "./turns.js";
import { exampleAbout, exampleIn, words } from "./words.js";

const REFRESH_MS = 5000;

export async function openIndex() {
  state.documents = [];
  at("#facts").replaceChildren();
  at("#examples").replaceChildren();
  at("#show-documents").textContent = words.documentsTitle;
  for (const one of ["#show-documents", "#show-chats", "#new-chat"]) at(one).hidden = false;
  showChat(newChat(at("#index").value));
  await showIndex(at("#index").value);
}

export async function showIndex(name) {
  const { data, status, examples } = await get(`/v1/documents?model=${encodeURIComponent(name)}`);
  if (name !== at("#index").value) return;  // the user has chosen another index meanwhile
  state.documents = data;
  at("#facts").replaceChildren(...facts(status));
  at("#documents .facts").replaceChildren(...facts(status));
  showExamples(examples);
  at("#show-documents").textContent = words.documents(status.documents);
  clearTimeout(state.later);
  if (status.is_making_gists) state.later = setTimeout(() => showIndex(name).catch(() => {}), REFRESH_MS);
}

function facts(status) {
  if (!status.documents) return words.empty(make("code", "gistrag build"));
  const lines = [words.size(status.documents, status.chunks)];
  if (status.gists) lines.push(words.kept(status.tokens, status.gists));
  const made = status.gist_chunks - status.pending_chunks;
  if (status.pending_chunks) lines.push(words.made(made, status.gist_chunks));
  else if (status.gists) lines.push(words.allMade);
  return lines.map((one) => make("span", one));
}

export function listDocuments() {
  const wanted = at("#documents input").value.toLowerCase();
  const rows = state.documents.filter((one) => one.path.toLowerCase().includes(wanted)).slice(0, 500).map((one) => {
    const button = make("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(one.path === state.scope));
    button.append(make("b", one.path), make("small", `${words.passages(one.chunks)}${one.stale ? `, ${words.stale}` : ""}`));
    button.addEventListener("click", () => {
      restrict(one.path === state.scope ? null : one.path);
      at("#documents").close();
      at("#question").focus();
    });
    const item = make("li");
    item.append(button);
    return item;
  });
  at("#documents ul").replaceChildren(...(rows.length ? rows : [make("li", words.noMatch)]));
}

export function restrict(path) {
  state.scope = path;
  at("#scope").hidden = path === null;
  at("#scope span").textContent = path === null ? "" : words.only(path);
  at("#scope").setAttribute("aria-label", words.searchAll(path));
}

function showExamples(examples) {
  const questions = examples.map(({ title, heading }, place) => (place === 1 && heading ? exampleIn(title, heading) : exampleAbout(title)));
  at("#examples").replaceChildren(...questions.map((one) => button(one, () => { if (!state.running) ask(one); })));
}
