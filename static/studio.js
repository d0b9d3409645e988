// The frame: theme without a reload, keys to go places, and a word when the studio does not answer.

const status = document.getElementById("status");

function say(text, bad = false) {
  if (status.textContent === text) return; // said already: no need to read it out again
  const line = document.createElement("p");
  line.className = bad ? "toast toast-bad" : "toast";
  line.textContent = text;
  status.replaceChildren(line);
}

document.addEventListener("say", ({ detail }) => say(detail.text, detail.bad));

document.querySelector(".themes")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const theme = event.submitter.value;
  document.documentElement.dataset.theme = theme;
  for (const button of event.target.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.value === theme));
  }
  const body = new URLSearchParams({ theme, to: "/" });
  await fetch("/theme", { method: "POST", body, redirect: "manual" }).catch(() => {});
});

document.querySelector(".places [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

// "g" and then a letter, as the navigation's data-key says.
let went = 0;
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "g") went = event.timeStamp;
  else if (event.timeStamp - went < 1500) {
    document.querySelector(`.places [data-key="${CSS.escape(event.key)}"]`)?.click();
    went = 0;
  }
});

const AWAY = "The studio does not answer. Is it still running?";
document.addEventListener("htmx:sendError", () => say(AWAY, true));
document.addEventListener("htmx:afterOnLoad", () => status.textContent === AWAY && status.replaceChildren());

// Times of day by the reader's clock, on the page and in whatever htmx puts into it.
const CLOCK = { hour: "2-digit", minute: "2-digit" };
document.addEventListener("htmx:load", ({ target }) => {
  for (const time of target.querySelectorAll("time[data-clock]")) {
    const at = new Date(time.dateTime);
    const today = at.toDateString() === new Date().toDateString();
    time.textContent = at.toLocaleString("en-GB", today ? CLOCK : { weekday: "short", ...CLOCK });
  }
  for (const zone of target.querySelectorAll("[data-zone]")) zone.textContent = zone.dataset.zone;
});

// A notice goes by itself once it was read; one that says no stays until the next. With a button it
// stays longer, and as long as someone is at it.
function fade(line) {
  setTimeout(() => (line.matches(":hover, :focus-within") ? fade(line) : line.remove()), line.querySelector("form") ? 20000 : 8000);
}
new MutationObserver(() => {
  const line = status.querySelector(".toast:not(.toast-bad)");
  if (line) fade(line);
}).observe(status, { childList: true });
const first = status.querySelector(".toast:not(.toast-bad)");
if (first) fade(first);
