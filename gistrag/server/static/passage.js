// The dialog that shows a passage, as the address of the page names it.
import { at, make } from "./elements.js";
import { passage } from "./markdown.js";
import { get } from "./server.js";
import { isMarkdown } from "./state.js";
import { words } from "./words.js";

export async function showPassage() {
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
