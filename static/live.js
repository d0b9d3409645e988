// The experiment's page, kept current by one stream of events that goes on where it left off.
import { LossChart } from "./charts.js";

const page = document.querySelector("[data-events]");
const chart = new LossChart(document.querySelector("[data-chart]"));
const line = document.getElementById("live");
const FINAL = ["succeeded", "failed", "cancelled"];
let source;
let seen = "";
let done = false;
let words = new Map();

function open() {
  if (source || done || document.hidden) return;
  source = new EventSource(page.dataset.events + (seen ? `?after=${encodeURIComponent(seen)}` : ""));
  const on = (name, act) =>
    source.addEventListener(name, (event) => {
      seen = event.lastEventId;
      act(JSON.parse(event.data));
    });
  source.onopen = () => tell(page.hasAttribute("data-ended") ? "" : "Live");
  source.onerror = () => tell("Connecting again…");
  on("points", (points) => chart.add(points));
  on("rewind", ({ run, step }) => chart.rewind(run, step));
  on("base", ({ validation_loss }) => {
    if (validation_loss !== chart.base) compare();
    chart.setBase(validation_loss);
  });
  on("runs", (panels) => panels.forEach(update));
  on("done", () => {
    done = true;
    close();
    tell("All runs have ended");
    if (!page.hasAttribute("data-ended")) compare();
    page.setAttribute("data-ended", "");
  });
}

function close() {
  source?.close();
  source = null;
}

// Connections to one address are few: a page that nobody sees gives its own back.
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
addEventListener("pagehide", close);
addEventListener("pageshow", open);

function tell(text) {
  if (line.textContent !== text) line.textContent = text;
}

function update(panel) {
  const place = document.querySelector(`[data-panel="${panel.id}"]`);
  if (!place || !chart.runs.has(panel.id)) return location.reload(); // a run that was added elsewhere
  for (const part of place.querySelectorAll("[data-field]")) {
    const text = panel[part.dataset.field];
    if (part.tagName === "PROGRESS") part.value = text;
    else if (part.textContent !== text) part.textContent = text;
  }
  const before = words.get(panel.id);
  words.set(panel.id, panel.words);
  if (before && before !== panel.words) say(`${place.getAttribute("data-name")}: ${panel.words}`);
  if (place.dataset.state === panel.state) return;
  const ended = FINAL.includes(panel.state);
  place.dataset.state = panel.state;
  const fresh = htmx.ajax("GET", `/runs/${panel.id}/panel`, { target: place, swap: "outerHTML" });
  if (ended) fresh.then(compare);
}

function compare() {
  htmx.trigger("#comparison", "refresh");
}

function say(text) {
  document.getElementById("said").textContent = text;
}

// When the button that was pressed goes away with its state, the keyboard stays at the run.
document.addEventListener("htmx:beforeSwap", ({ target }) => {
  const panel = document.activeElement?.closest("[data-panel]");
  if (!panel || !(target.contains(panel) || panel.contains(target))) return;
  const { id } = document.activeElement;
  target.parentElement.addEventListener("htmx:afterSettle", () => {
    if (document.activeElement !== document.body) return;
    (document.getElementById(id) ?? document.querySelector(`#${panel.id} h3`))?.focus();
  }, { once: true });
});

open();
