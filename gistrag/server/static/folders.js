// Adding a folder: the dialog, and how far the server is with reading it.
import { openIndex } from "./documents.js";
import { at } from "./elements.js";
import { call, get } from "./server.js";
import { announce } from "./state.js";
import { words } from "./words.js";

const POLL_MS = 1000;
let isFollowed = false;

export async function showFolders() {
  tell("");
  at("#folders").showModal();
  await follow();
}

export async function addFolder() {
  const input = at("#folders input");
  try {
    show(await (await call("/v1/folders", { path: input.value.trim() })).json());
    await follow({ wasReading: true });
  } catch (error) {
    tell(error.message);
  }
}

// Shows how far a build is until it ends, and then opens its index.
async function follow({ wasReading = false } = {}) {
  if (isFollowed) return;
  isFollowed = true;
  try {
    for (;;) {
      const state = await get("/v1/folders");
      show(state);
      if (state.build?.state !== "reading") {
        if (wasReading && state.build.state === "ready") await openBuilt(state.build);
        return;
      }
      wasReading = true;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  } finally {
    isFollowed = false;
  }
}

function show({ build, choices }) {
  at("#folder-choices").replaceChildren(...choices.map((one) => new Option(one)));
  const isReading = build?.state === "reading";
  at("#folders [type=submit]").disabled = isReading;
  const bar = at("#folders progress");
  bar.hidden = !isReading;
  if (build?.of) {
    bar.max = build.of;
    bar.value = build.documents;
  } else bar.removeAttribute("value");
  if (isReading) tell(build.of ? words.reading(build.path, build.documents, build.of) : words.looksInto(build.path));
  if (build?.state === "failed") tell(words.buildFailed(build.path, build.error));
}

async function openBuilt(build) {
  const names = (await get("/v1/models")).data.map((one) => one.id);
  at("#index").replaceChildren(...names.map((one) => new Option(one)));
  at("#index").value = build.name;
  at("header label").hidden = names.length < 2;
  await openIndex();
  tell(words.added(build.path, build.skipped));
  announce(words.added(build.path, build.skipped));
}

function tell(line) {
  at("#folders [role=status]").textContent = line;
}
