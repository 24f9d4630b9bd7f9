// Requests to the server, and the dialog that asks for a key.
import { at } from "./elements.js";
import { words } from "./words.js";

export async function call(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }) };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, request).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(words.unreachable);
  });
  if (response.status === 401) {
    await askForKey();
    return call(path, body, signal);
  }
  if (!response.ok) {
    const failure = await response.json().catch(() => ({}));
    throw new Error(failure.error?.message ?? words.status(response.status));
  }
  return response;
}

export const get = async (path) => (await call(path)).json();

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();  // not every browser can iterate over a stream
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function askForKey() {
  const dialog = at("#key");
  const wasRefused = sessionStorage.getItem("key") !== null;
  sessionStorage.removeItem("key");
  dialog.showModal();
  at("[role=alert]", dialog).textContent = wasRefused ? words.keyRefused : "";
  return new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      const key = at("input", dialog).value.trim();
      at("input", dialog).value = "";
      if (!key) return reject(new Error(words.keyMissing));
      sessionStorage.setItem("key", key);
      resolve();
    }, { once: true });
  });
}
