// The conversations, kept in this browser and nowhere else.
import { words } from "./words.js";

const PREFIX = "gistrag.chat.";

// A turn: question, scope, mode, text; details of a complete answer, or the error. A stopped one has neither.
export const newChat = (index) => ({ id: String(Date.now()), index, turns: [] });

export function saved(id) {
  try {
    const chat = JSON.parse(localStorage.getItem(PREFIX + id));
    return Array.isArray(chat?.turns) && chat.turns.length ? { ...chat, id } : null;
  } catch {
    return null;
  }
}

// Returns all conversations, the newest first.
export function chats() {
  const ids = Object.keys(localStorage).filter((one) => one.startsWith(PREFIX)).map((one) => one.slice(PREFIX.length));
  return ids.sort((a, b) => b - a).map(saved).filter(Boolean);
}

// Keeps a conversation; where the browser has no room left, the oldest others go first.
export function save(chat) {
  const others = chats().filter((one) => one.id !== chat.id);
  for (;;) {
    try {
      return localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
    } catch {
      if (!others.length) return undefined;
      forget(others.pop().id);
    }
  }
}

export const forget = (id) => localStorage.removeItem(PREFIX + id);

export function forgetAll() {
  for (const one of Object.keys(localStorage)) if (one.startsWith(PREFIX)) localStorage.removeItem(one);
}

export const title = (chat) => chat.turns[0].question;
export const date = (chat) => new Date(Number(chat.id)).toLocaleString(words.locale, { dateStyle: "medium", timeStyle: "short" });

// Returns a conversation as Markdown, with the sources of each answer and the sentence it rests on.
export function asMarkdown(chat) {
  return [`# ${title(chat)}`, `${chat.index}, ${date(chat)}`, ...chat.turns.flatMap(told)].join("\n\n") + "\n";
}

function told({ question, text, details, error }) {
  const sources = details?.sources ?? [];
  const listed = sources.map((one, place) => `${place + 1}. ${one.place}`).join("\n");
  const quoted = sources.filter((one) => one.evidence).map((one) => `> ${one.evidence.text.replaceAll("\n", "\n> ")}`);
  return [`## ${question}`, text || error, ...quoted, listed].filter(Boolean);
}
