// The page: what happens at the start, and on clicks and keys.
import { saved } from "./chats.js";
import { listDocuments, openIndex, restrict } from "./documents.js";
import { at } from "./elements.js";
import { addFolder, showFolders } from "./folders.js";
import { exportChat, forgetEverything, isRecalled, listChats, recall, showChat, startAnew } from "./history.js";
import { showPassage } from "./passage.js";
import { get } from "./server.js";
import { state } from "./state.js";
import { ask, fail } from "./turns.js";
import { speak, words } from "./words.js";

async function start() {
  takeKey();
  const { data, may_add_folders: mayAdd } = await get("/v1/models");
  at("#show-folders").hidden = !mayAdd;
  if (!data.length) {
    at("#facts").textContent = words.noIndex;
    return mayAdd ? showFolders() : undefined;
  }
  at("#index").replaceChildren(...data.map((one) => new Option(one.id)));
  const linked = data.find((one) => location.hash.startsWith(`#passage/${encodeURIComponent(one.id)}/`));
  if (linked) at("#index").value = linked.id;
  at("header label").hidden = data.length < 2;
  const chat = saved(sessionStorage.getItem("chat"));
  if (chat && !linked && data.some((one) => one.id === chat.index)) at("#index").value = chat.index;
  await openIndex();
  if (chat?.index === at("#index").value && !state.chat.turns.length) showChat(chat);
  await showPassage();
}

// A key in the address, which the server prints, goes where a typed one would.
function takeKey() {
  const [, key] = location.hash.match(/^#key=([\w-]+)$/) ?? [];
  if (!key) return;
  sessionStorage.setItem("key", key);
  history.replaceState(null, "", location.pathname);
}

const guarded = (work) => (...given) => work(...given).catch((error) => fail(at("#conversation"), error.message));

at("form.ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) return state.running.abort();
  const question = at("#question").value.trim();
  if (!question) return at("#question").focus();
  at("#question").value = "";
  state.recalled = 0;
  ask(question);
});
at("#question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running) at("form.ask").requestSubmit();
  }
  const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (step && !event.isComposing && (isRecalled() || (step > 0 && !at("#question").value))) {
    event.preventDefault();
    recall(isRecalled() ? step : 1 - state.recalled);
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
at("#show-folders").addEventListener("click", guarded(showFolders));
at("#folders form").addEventListener("submit", (event) => {
  event.preventDefault();
  addFolder();
});
at("#new-chat").addEventListener("click", startAnew);
at("#show-chats").addEventListener("click", () => {
  listChats();
  at("#chats").showModal();
});
at("#export").addEventListener("click", exportChat);
at("#forget-all").addEventListener("click", forgetEverything);
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
for (const dialog of document.querySelectorAll("#passage, #documents, #chats, #folders")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
const hint = () => { at("#hint").textContent = words[`${at("input[name=mode]:checked").value}Hint`]; };
at("fieldset").addEventListener("change", hint);
addEventListener("hashchange", guarded(showPassage));
speak();
hint();
if (matchMedia("(pointer: fine)").matches) at("#question").focus();
guarded(start)();
