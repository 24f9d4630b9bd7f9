// The conversation on the page, the list of those before, and the questions asked in it.
import { asMarkdown, chats, date, forget, forgetAll, newChat, title } from "./chats.js";
import { openIndex, restrict } from "./documents.js";
import { at, button, make, written } from "./elements.js";
import { state } from "./state.js";
import { begin, end, fail, showSearched } from "./turns.js";
import { words } from "./words.js";

export function showChat(chat) {
  state.running?.abort();
  state.chat = chat;
  state.recalled = 0;
  sessionStorage.setItem("chat", chat.id);
  at("#conversation").replaceChildren();
  at("#welcome").hidden = chat.turns.length > 0;
  restrict(null);
  for (const turn of chat.turns) {
    const entry = begin(turn);
    entry.append(written("div", turn.text, "answer"));
    if (turn.details?.searched) showSearched(entry, turn.details.searched);
    end(entry, turn, chat);
  }
  scrollTo(0, document.body.scrollHeight);
}

// Opens a conversation, with its index.
export async function resume(chat) {
  const isOther = chat.index !== at("#index").value;
  at("#index").value = chat.index;
  if (isOther) await openIndex();
  showChat(chat);
}

export function listChats() {
  const served = [...at("#index").options].map((one) => one.value);
  const rows = chats().filter((one) => served.includes(one.index)).map((chat) => {
    const open = button("", () => { at("#chats").close(); resume(chat).catch((error) => fail(at("#conversation"), error.message)); }, "open");
    open.setAttribute("aria-current", String(chat.id === state.chat.id));
    open.append(written("b", title(chat)), make("small", served.length > 1 ? `${chat.index}, ${date(chat)}` : date(chat)));
    const gone = button("×", () => { forget(chat.id); listChats(); if (chat.id === state.chat.id) startAnew(); }, "gone");
    gone.ariaLabel = words.forget(title(chat));
    const item = make("li");
    item.append(open, gone);
    return item;
  });
  at("#chats ul").replaceChildren(...(rows.length ? rows : [make("li", words.noChats)]));
  at("#forget-all").disabled = !rows.length;
  at("#export").disabled = !state.chat.turns.length;
}

export function startAnew() {
  showChat(newChat(at("#index").value));
  at("#question").focus();
}

export function exportChat() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([asMarkdown(state.chat)], { type: "text/markdown" }));
  link.download = `gistrag-${new Date(Number(state.chat.id)).toISOString().slice(0, 10)}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export function forgetEverything() {
  if (!confirm(words.forgetAllSure)) return;
  forgetAll();
  startAnew();
  listChats();
}

// Puts an earlier question of the conversation into the box: the last one first.
export function recall(step) {
  const asked = state.chat.turns.map((one) => one.question);
  const place = Math.min(Math.max(0, state.recalled + step), asked.length);
  state.recalled = place;
  at("#question").value = place ? asked[asked.length - place] : "";
}

export const isRecalled = () => state.recalled > 0 && at("#question").value === state.chat.turns.at(-state.recalled)?.question;
