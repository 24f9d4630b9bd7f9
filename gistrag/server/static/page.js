// The page: asking, indexes, documents and passages.
import { showAnswer } from "./answer.js";
import { at, make, written } from "./elements.js";
import { passage } from "./markdown.js";
import { call, events, get } from "./server.js";
import { speak, words } from "./words.js";

const REFRESH_MS = 5000;
const state = { asked: [], documents: [], scope: null, running: null };

// An answer

async function ask(question) {
  const entry = begin(question);
  const stopper = new AbortController();
  const answer = { text: "", details: null, index: at("#index").value };
  run(stopper);
  try {
    const messages = [...state.asked, { role: "user", content: question }];
    const gistrag = { mode: chosenMode(), scope: state.scope, footnotes: false };
    const body = { model: answer.index, messages, stream: true, gistrag };
    const response = await call("/v1/chat/completions", body, stopper.signal);
    for await (const event of events(response)) take(event, answer, entry, question);
    if (!answer.details?.timings) throw new Error(words.endedEarly);
    state.asked = [...messages, { role: "assistant", content: answer.text }];
    finish(entry, answer);
  } catch (error) {
    if (error.name === "AbortError") stop(entry);
    else fail(entry, error);
  } finally {
    entry.setAttribute("aria-busy", "false");
    at(".thinking", entry)?.remove();
    run(null);
  }
}

function begin(question) {
  const entry = make("article");
  entry.setAttribute("aria-busy", "true");
  const heading = written("h2", question);
  if (state.scope) heading.append(make("small", words.only(state.scope)));
  entry.append(heading, make("p", words.looking, "thinking"), written("div", "", "answer"));
  at("#welcome").hidden = true;
  at("#conversation").append(entry);
  entry.scrollIntoView({ block: "start" });
  announce(words.looking);
  return entry;
}

function take(event, answer, entry, question) {
  if (event.error) throw new Error(event.error.message);
  const piece = event.choices?.[0]?.delta?.content ?? "";
  if (event.gistrag) answer.details = event.gistrag;
  const searched = event.gistrag?.searched;
  if (searched && searched !== question && !at(".searched", entry)) at("h2", entry).after(written("p", words.searched(searched), "searched"));
  if (!piece) return;
  const isNear = innerHeight + scrollY > document.body.scrollHeight - 120;
  at(".thinking", entry)?.remove();
  answer.text += piece;
  at(".answer", entry).textContent = answer.text;
  if (isNear) scrollTo(0, document.body.scrollHeight);
}

function finish(entry, answer) {
  const isNear = innerHeight + scrollY > document.body.scrollHeight - 120;
  announce(showAnswer(entry, answer, isMarkdown));
  if (isNear) scrollTo(0, document.body.scrollHeight);
}

// Whether the text of a document is Markdown; a file of code or plain text is shown as it is.
const isMarkdown = (path) => Boolean(state.documents.find((one) => one.path === path)?.markdown);

function stop(entry) {
  entry.append(make("p", words.stopped, "stopped"));
  announce(words.stopped);
}

function fail(entry, error) {
  const alarm = make("p", error.message, "alarm");
  alarm.setAttribute("role", "alert");
  entry.append(alarm);
}

function run(stopper) {
  state.running = stopper;
  at("#act").textContent = stopper ? words.stop : words.ask;
  at("#act").classList.toggle("stop", Boolean(stopper));
  at("#index").disabled = Boolean(stopper);
}

const announce = (text) => { at("#status").textContent = text; };
const chosenMode = () => at("input[name=mode]:checked").value;

// Indexes, documents, passages

async function openIndex() {
  const name = at("#index").value;
  state.asked = [];
  state.documents = [];
  restrict(null);
  at("#conversation").replaceChildren();
  at("#facts").replaceChildren();
  at("#show-documents").textContent = words.documentsTitle;
  at("#welcome").hidden = false;
  await showIndex(name);
}

async function showIndex(name) {
  const { data, status } = await get(`/v1/documents?model=${encodeURIComponent(name)}`);
  if (name !== at("#index").value) return;  // the user has chosen another index meanwhile
  state.documents = data;
  at("#facts").replaceChildren(...facts(status));
  at("#show-documents").textContent = words.documents(status.documents);
  clearTimeout(state.later);
  if (status.is_making_gists) state.later = setTimeout(() => showIndex(name).catch(() => {}), REFRESH_MS);
}

function facts(status) {
  if (!status.documents) return words.empty(make("code", "gistrag build"));
  const lines = [words.size(status.documents, status.chunks), words.kept(status.tokens, status.gists)];
  const made = status.gist_chunks - status.pending_chunks;
  if (status.pending_chunks) lines.push(words.made(made, status.gist_chunks));
  return lines.map((one) => make("span", one));
}

function listDocuments() {
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

function restrict(path) {
  state.scope = path;
  at("#scope").hidden = path === null;
  at("#scope span").textContent = path === null ? "" : words.only(path);
  at("#scope").setAttribute("aria-label", words.searchAll(path));
}

async function showPassage() {
  const [, index, id, start, end] = location.hash.match(/^#passage\/([^/]+)\/(-?\d+)(?:\/(\d+)-(\d+))?$/) ?? [];
  const dialog = at("#passage");
  if (!id) return dialog.close();
  const found = await get(`/v1/passages/${id}?model=${index}`).catch((error) => ({ path: words.passage, text: error.message, heading: [] }));
  const where = found.page ? words.page(found.page) : found.heading.join(" › ");
  at("#passage-place").replaceChildren(found.path, make("small", where));
  const [first, last] = [start, end].map((one) => Math.max(0, one - found.start) || 0);
  at(".body", dialog).replaceChildren(...passage(found.text, first, last, isMarkdown(found.path)).childNodes);
  for (const one of dialog.querySelectorAll("[data-go]")) leadOn(one, index, found[one.dataset.go]);
  if (!dialog.open) dialog.showModal();
  at(".body", dialog).scrollTop = 0;
  const highlighted = at("mark", dialog);
  if (!highlighted) return;
  at("#passage-place").append(make("small", words.highlighted));
  highlighted.tabIndex = -1;  // a screen reader goes on from it
  highlighted.focus({ preventScroll: true });
  highlighted.scrollIntoView({ block: "center" });
}

function leadOn(button, index, id) {
  if (!id && button === document.activeElement) at("#passage .body").focus();  // a disabled button would lose the keyboard focus
  button.disabled = !id;
  button.onclick = () => location.replace(`#passage/${index}/${id}`);
}

async function start() {
  const { data } = await get("/v1/models");
  at("#index").replaceChildren(...data.map((one) => new Option(one.id)));
  const linked = decodeURIComponent(location.hash.split("/")[1] ?? "");
  if (data.some((one) => one.id === linked)) at("#index").value = linked;
  at("header label").hidden = data.length < 2;
  at("#show-documents").hidden = false;
  await openIndex();
  await showPassage();
}

// Events

const guarded = (work) => (...given) => work(...given).catch((error) => fail(at("#conversation"), error));

at("form.ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) return state.running.abort();
  const question = at("#question").value.trim();
  if (!question) return at("#question").focus();
  at("#question").value = "";
  ask(question);
});
at("#question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running) at("form.ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") state.running?.abort();
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    at("#question").focus();
  }
});
at("#show-documents").addEventListener("click", () => {
  at("#documents input").value = "";
  listDocuments();
  at("#documents").showModal();
});
at("#documents input").addEventListener("input", listDocuments);
at("#scope").addEventListener("click", () => {
  restrict(null);
  at("#question").focus();
});
at("#index").addEventListener("change", guarded(openIndex));
at("#passage").addEventListener("close", () => {
  if (location.hash) history.replaceState(null, "", location.pathname);
});
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("#passage, #documents")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
const hint = () => { at("#hint").textContent = words[`${chosenMode()}Hint`]; };
at("fieldset").addEventListener("change", hint);
addEventListener("hashchange", guarded(showPassage));
speak();
hint();
if (matchMedia("(pointer: fine)").matches) at("#question").focus();
guarded(start)();
