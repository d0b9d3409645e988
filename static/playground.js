// Writes the answers of several models as they come: lines of JSON, appended as text, once a frame.

let reading; // the stream being read; a new ask ends it

async function follow(place) {
  reading?.abort();
  const mine = (reading = new AbortController());
  const open = new Map();
  const waiting = [];
  let frame;
  const paint = () => {
    frame = null;
    for (const change of waiting.splice(0)) write(place, change, open);
  };
  let tries = 0;
  while (!mine.signal.aborted && tries < 5) {
    try {
      const response = await fetch(place.dataset.stream, { signal: mine.signal });
      if (!response.ok) throw new Error(response.statusText);
      for await (const change of lines(response.body)) {
        tries = 0;
        waiting.push(change);
        frame ??= requestAnimationFrame(paint);
      }
      cancelAnimationFrame(frame);
      paint();
      if (open.size && [...open.values()].every((state) => !["queued", "running", "stopping"].includes(state))) break;
    } catch {
      if (mine.signal.aborted) return;
    }
    tries += 1;
    await new Promise((later) => setTimeout(later, 500 * tries));
  }
  const stop = place.querySelector("[data-stop]");
  if (stop) stop.hidden = true;
  place.querySelector("[data-said]").textContent = tries < 5 ? "All answers are there." : "The studio does not answer. Reload the page to see the answers.";
}

async function* lines(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = body.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

function write(place, change, open) {
  const column = place.querySelector(`[data-completion="${change.id}"]`);
  if (!column) return;
  open.set(change.id, change.state);
  const part = (name) => column.querySelector(`[data-part="${name}"]`);
  if (change.text !== undefined) part("text").textContent = change.text;
  else if (change.more) part("text").append(change.more);
  for (const name of ["words", "error", "first", "speed", "tokens"]) part(name).textContent = change[name];
  part("words").className = `small badge badge-${change.state}`;
  column.dataset.state = change.state;
  column.setAttribute("aria-busy", String(["queued", "running"].includes(change.state)));
}

function start() {
  const place = document.querySelector("#answers[data-stream]");
  if (place) follow(place);
  else reading?.abort();
}

document.addEventListener("htmx:afterSettle", ({ detail }) => {
  if (detail.target?.id !== "answers" && detail.elt.id !== "answers") return;
  start();
  document.getElementById("problems")?.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.target.id !== "input") return;
  event.preventDefault();
  document.getElementById("ask").requestSubmit();
});
const applied = document.querySelector("[data-applied]");
const lock = () => { document.getElementById("template").readOnly = !applied.checked; };
applied?.addEventListener("change", lock);
if (applied) lock();
start();
