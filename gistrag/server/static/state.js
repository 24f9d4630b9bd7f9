// What the page shows now, for all its parts.
import { at } from "./elements.js";
import { newChat } from "./chats.js";

// Of the chosen index: the open conversation, and the documents. scope: the document to stay in; running: stops the answer
// that is under way; recalled: how many questions back the one in the box is.
export const state = { chat: newChat(""), documents: [], scope: null, running: null, recalled: 0 };

// Whether the text of a document is Markdown; a file of code or plain text is shown as it is.
export const isMarkdown = (path) => Boolean(state.documents.find((one) => one.path === path)?.markdown);

export const announce = (text) => { at("#status").textContent = text; };
