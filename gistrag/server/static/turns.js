// A question and its answer, from asking to trying again.
import { showAnswer } from "./answer.js";
import { save } from "./chats.js";
import { restrict } from "./documents.js";
import { at, button, make, written } from "./elements.js";
import { call, events } from "./server.js";
import { announce, isMarkdown, state } from "./state.js";
import { words } from "./words.js";

const TURNS = 6;

export async function ask(question) {
  const turn = { question, scope: state.scope, mode: chosenMode(), text: "", details: null };
  const messages = [...earlier(state.chat), { role: "user", content: question }];
  const { chat } = state;
  chat.turns.push(turn);
  save(chat);
  const entry = begin(turn);
  entry.setAttribute("aria-busy", "true");
  entry.append(make("p", words.looking, "thinking"), written("div", "", "answer"));
  entry.scrollIntoView({ block: "start" });
  announce(words.looking);
  const stopper = new AbortController();
  run(stopper);
  try {
    await answer(turn, chat, messages, entry, stopper.signal);
  } catch (error) {
    if (error.name !== "AbortError") turn.error = error.message;
  }
  entry.setAttribute("aria-busy", "false");
  at(".thinking", entry)?.remove();
  if (state.running === stopper) run(null);
  save(chat);
  end(entry, turn, chat);
  if (turn.error && !at("#question").value) at("#question").value = question;
}

// The server joins a question with those before that it leans on, and needs nothing else of the conversation.
const earlier = (chat) => chat.turns.filter((one) => one.details).slice(-TURNS).map((one) => ({ role: "user", content: one.question }));

async function answer(turn, chat, messages, entry, signal) {
  const gistrag = { mode: turn.mode, scope: turn.scope, footnotes: false };
  const response = await call("/v1/chat/completions", { model: chat.index, messages, stream: true, gistrag }, signal);
  let details = null;
  for await (const event of events(response)) {
    details = event.gistrag ?? details;
    take(event, turn, entry);
  }
  if (!details?.timings) throw new Error(words.endedEarly);
  turn.details = details;
}

export function begin({ question, scope }) {
  const entry = make("article");
  const heading = written("h2", question);
  if (scope) heading.append(make("small", words.only(scope)));
  entry.append(heading);
  at("#welcome").hidden = true;
  at("#conversation").append(entry);
  return entry;
}

function take(event, turn, entry) {
  if (event.error) throw new Error(event.error.message);
  const piece = event.choices?.[0]?.delta?.content ?? "";
  if (event.gistrag?.searched) showSearched(entry, event.gistrag.searched);
  if (!piece) return;
  following(() => {
    at(".thinking", entry)?.remove();
    turn.text += piece;
    at(".answer", entry).textContent = turn.text;
  });
}

export function showSearched(entry, searched) {
  const question = at("h2", entry).firstChild.data;
  if (searched !== question && !at(".searched", entry)) at("h2", entry).after(written("p", words.searched(searched), "searched"));
}

// Keeps the end of the page in sight, if it was, while the page grows.
export function following(grow) {
  const isNear = innerHeight + scrollY > document.body.scrollHeight - 120;
  grow();
  if (isNear) scrollTo(0, document.body.scrollHeight);
}

// Shows how a turn ended, and what may be done with it.
export function end(entry, turn, chat) {
  following(() => {
    if (turn.details) announce(showAnswer(entry, { ...turn, index: chat.index }, isMarkdown));
    else if (turn.error) fail(entry, turn.error);
    else stop(entry);
    const actions = make("p", undefined, "actions");
    if (turn.text) actions.append(button(words.copy, (event) => copy(turn.text, event.target), "plain-action"));
    actions.append(button(words.again, () => again(entry, turn), "plain-action again"));
    entry.append(actions);
  });
}

async function copy(text, shown) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyOldWay(text);
  shown.textContent = words.copied;
  announce(words.copied);
}

// The clipboard is closed to pages that came over plain HTTP from another machine.
function copyOldWay(text) {
  const box = make("textarea", text);
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

// Asks the last question once more, in place of its answer, in the mode that is chosen now.
function again(entry, turn) {
  if (state.running) return;
  state.chat.turns = state.chat.turns.filter((one) => one !== turn);
  entry.remove();
  if (at("#question").value === turn.question) at("#question").value = "";
  restrict(turn.scope);
  ask(turn.question);
}

function stop(entry) {
  entry.append(make("p", words.stopped, "stopped"));
  announce(words.stopped);
}

export function fail(entry, message) {
  const alarm = make("p", message, "alarm");
  alarm.setAttribute("role", "alert");
  entry.append(alarm);
}

function run(stopper) {
  state.running = stopper;
  at("#act").textContent = stopper ? words.stop : words.ask;
  at("#act").classList.toggle("stop", Boolean(stopper));
  at("#index").disabled = Boolean(stopper);
}

const chosenMode = () => at("input[name=mode]:checked").value;
