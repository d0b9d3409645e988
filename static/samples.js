// Answers while a run learned: a slider shows one moment at a time. Without it all stand below each other.
for (const box of document.querySelectorAll("[data-moments]")) {
  const moments = [...box.querySelectorAll("[data-moment]")];
  const slider = box.querySelector("input[type=range]");
  const told = box.querySelector("output");
  const show = () => {
    moments.forEach((moment, at) => (moment.hidden = at !== Number(slider.value)));
    told.value = moments[slider.value].dataset.moment;
    slider.setAttribute("aria-valuetext", told.value);
  };
  slider.addEventListener("input", show);
  slider.closest("[hidden]").hidden = false;
  show();
}
