// Answers while runs learn: a slider shows one moment at a time. Without it all stand below each other.
// While a run goes on more come: what the reader has chosen stays; whoever is at the newest follows.
const box = document.querySelector("[data-moments]");
const slider = document.getElementById("moment");
const told = box?.querySelector("output");
let chosen = null; // the label of a moment; null: the newest
let across = 0; // how far its table was scrolled sideways

const moments = () => [...box.querySelectorAll("[data-moment]")];

function show() {
  const all = moments();
  const at = all.findIndex((moment) => moment.dataset.moment === chosen);
  slider.closest(".scrub").hidden = !all.length;
  if (!all.length) return;
  slider.max = all.length - 1;
  slider.value = at < 0 ? all.length - 1 : at;
  all.forEach((moment, place) => (moment.hidden = place !== Number(slider.value)));
  const label = all[slider.value].dataset.moment;
  if (told.value !== label) told.value = label;
  slider.setAttribute("aria-valuetext", label);
}

slider?.addEventListener("input", () => {
  chosen = Number(slider.value) < Number(slider.max) ? moments()[slider.value].dataset.moment : null;
  show();
});
// A table that the keyboard is in does not go away under it.
box?.addEventListener("focusin", ({ target }) => (chosen = target.closest("[data-moment]")?.dataset.moment ?? chosen));
const table = () => box.querySelector("[data-moment]:not([hidden]) .table-wrap");
document.addEventListener("htmx:beforeSwap", () => (across = table()?.scrollLeft ?? 0));
document.addEventListener("htmx:afterSwap", () => {
  show();
  if (table()) table().scrollLeft = across;
});
if (box) show();
