// Keys of a page: j and k step through what is marked data-step, others press the button with that data-key.
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const way = { j: 1, k: -1 }[event.key];
  if (!way) return document.querySelector(`main [data-key="${CSS.escape(event.key)}"]`)?.click();
  const steps = [...document.querySelectorAll("[data-step]")];
  const at = steps.indexOf(document.activeElement.closest("[data-step]"));
  steps[at < 0 && way < 0 ? 0 : at + way]?.focus();
});
