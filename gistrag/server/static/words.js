// The words of the page. Answers, documents and errors of the server come as they are.

const english = {
  locale: "en",
  number: (value) => value.toLocaleString("en"),
  seconds: (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} s`,
  passages: (count) => plural(count, "passage"),
  documents: (count) => plural(count, "document"),
  sources: (count) => plural(count, "source"),
  title: "Ask your documents",
  skip: "Skip to the question",
  index: "Index",
  documentsTitle: "Documents",
  documentsHint: "Choose one to search only in it.",
  filter: "Filter",
  filterDocuments: "Filter documents",
  noMatch: "No documents match.",
  stale: "stale",
  conversation: "Questions and answers",
  question: "Question",
  askHere: "Ask a question",
  ask: "Ask",
  stop: "Stop",
  mode: "What the model reads",
  gist: "Gists",
  text: "Text",
  hybrid: "Hybrid",
  gistHint: "Compressed passages, computed at build time: fastest.",
  textHint: "Full text of the passages: slower.",
  hybridHint: "Full text of the best passage, gists of the others.",
  close: "Close",
  previous: "← Previous",
  next: "Next →",
  keyTitle: "API key",
  keyHint: "This server requires a key. Your browser keeps it until you close this tab.",
  keyGo: "Continue",
  keyRefused: "That key was not accepted.",
  keyMissing: "This server requires an API key. Reload the page to enter one.",
  unreachable: "The server cannot be reached. Is it still running?",
  status: (status) => `The server answered ${status}.`,
  endedEarly: "The answer ended early. Is the server still running?",
  looking: "Looking for passages",
  searched: (question) => `Searched: ${question}`,
  only: (path) => `only in ${path}`,
  searchAll: (path) => `Searching only in ${path}. Search all documents`,
  nothing: "The model gave no answer.",
  inNoPassage: "In no passage",
  unsupported: (names) => `In no passage: ${names}.`,
  answered: "Sure.",
  unsure: "Not sure.",
  "not found": "Not found.",
  likely: (percent) => `${percent} % likely to be right`,
  passageSays: "The passage says:",
  modelAnswers: "The model answers:",
  guessedFrom: (guess) => `The model guessed “${guess}”, which is probably wrong, from:`,
  guessed: (guess) => `The model guessed “${guess}”, which is probably wrong.`,
  stopped: "Stopped.",
  openSource: (number) => `Open source ${number}`,
  asText: "text",
  asGists: "gists",
  firstWord: "to the first word",
  total: "in total",
  gistTokens: (count) => plural(count, "gist token"),
  standFor: (count) => `for ${plural(count, "token")} of text`,
  readings: (count) => [english.number(count), "readings"],
  tokensAsText: (count) => [plural(count, "token"), "read as text"],
  pendingAsText: (count) => [plural(count, "passage"), "read as text: the gists are still to be made"],
  unusable: (count) => [plural(count, "gist"), "unusable, read as text"],
  leftOut: (count) => [plural(count, "passage"), "left out: the context window is full"],
  size: (documents, passages) => `${plural(documents, "document")} in ${plural(passages, "passage")}.`,
  kept: (tokens, gists) => `${plural(tokens, "token")}, compressed to ${plural(gists, "gist token")}.`,
  made: (made, all) => `Gists made of ${english.number(made)} of ${plural(all, "passage")}.`,
  empty: (command) => ["This index has no documents yet. Put files into its folder and run ", command, "."],
  newChat: "New chat",
  chats: "Chats",
  chatsHint: "Kept in this browser only.",
  noChats: "No chats yet.",
  forget: (title) => `Forget ${title}`,
  forgetAll: "Forget all",
  forgetAllSure: "Forget all chats kept in this browser?",
  exportChat: "Export this chat",
  copy: "Copy",
  copied: "Copied",
  again: "Try again",
  examples: "Example questions",
  page: (page) => `page ${page}`,
  passage: "Passage",
  highlighted: "Highlighted: what the answer rests on",
};

const plural = (count, word) => `${english.number(count)} ${word}${count === 1 ? "" : "s"}`;

// An example asks in the language of the document.
const isKorean = (text) => /[\uac00-\ud7a3]/.test(text);
export const exampleAbout = (title) => (isKorean(title) ? `“${title}” 문서를 요약해 주세요.` : `What is “${title}” about?`);
export const exampleIn = (title, heading) =>
  isKorean(title + heading) ? `“${title}” 문서에서 “${heading}”에 대해 알려 주세요.` : `What does “${title}” say about “${heading}”?`;

export const TABLES = { en: english };
export const words = TABLES[navigator.language.slice(0, 2)] ?? english;

// Puts the words into the page: the text of what has data-word, the name of what has data-name, the hint in an input.
export function speak() {
  document.documentElement.lang = Object.keys(TABLES).find((one) => TABLES[one] === words);
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = words[one.dataset.word];
  for (const one of document.querySelectorAll("[data-name]")) one.ariaLabel = words[one.dataset.name];
  for (const one of document.querySelectorAll("[data-hint]")) one.placeholder = words[one.dataset.hint];
}
