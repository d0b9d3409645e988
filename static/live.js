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
const teller = document.getElementById("tell");
const TELL = "studio-tell"; // kept in this browser: whether its person wants to be told

function open() {
  if (source || done || (document.hidden && !wanted())) return;
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
    if (!page.hasAttribute("data-ended")) {
      ring();
      compare();
    }
    page.setAttribute("data-ended", "");
  });
}

function close() {
  source?.close();
  source = null;
}

// Connections to one address are few: a page that nobody sees gives its own back. One that is to
// tell its person keeps it: only over the stream does it hear that the runs have ended.
document.addEventListener("visibilitychange", () => (document.hidden && !wanted() ? close() : open()));
addEventListener("pagehide", close);
addEventListener("pageshow", open);

function wanted() {
  return "Notification" in window && Notification.permission === "granted" && localStorage[TELL] === "yes";
}

function show() {
  teller.hidden = !("Notification" in window) || page.hasAttribute("data-ended");
  teller.setAttribute("aria-pressed", String(wanted()));
}

teller.addEventListener("click", async () => {
  const permission = wanted() ? "off" : await Notification.requestPermission();
  localStorage[TELL] = permission === "granted" ? "yes" : "no";
  const text = "The browser does not let the studio tell you. Allow notifications in its settings for this page.";
  if (permission === "denied") document.dispatchEvent(new CustomEvent("say", { detail: { text, bad: true } }));
  show();
});

function ring() {
  teller.hidden = true;
  const states = [...document.querySelectorAll("[data-panel]")].map((one) => `${one.dataset.name}: ${words.get(one.dataset.panel)}`);
  if (wanted()) new Notification(document.querySelector("h1").textContent, { body: states.join("\n"), tag: location.pathname });
}

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

show();
open();
