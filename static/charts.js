// The loss chart: train loss raw and smoothed, validation points and the base model's line, of several runs.

const REDRAW_MS = 250;
const AXES = {
  step: ["Step", (point) => point.step, (x) => `step ${x}`],
  epoch: ["Epoch", (point) => point.epoch, (x) => `epoch ${x.toFixed(2)}`],
  time: ["Training time, s", (point) => point.seconds, (x) => `${x.toFixed(0)} s`],
  tokens: ["Tokens seen", (point) => point.tokens, (x) => `${x.toLocaleString("en")} tokens`],
};
const figure = (value) => (value === null || value === undefined ? "not a number" : value.toFixed(3));

// Running mean without the pull to its start: divided by the weight gathered so far. Gaps stay gaps.
export function smoothed(values, weight) {
  let mean = 0;
  let gathered = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    gathered = weight * gathered + (1 - weight);
    return mean / gathered;
  });
}

function shape(marker, x, y, size) {
  const path = new Path2D();
  const corners = {
    square: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    triangle: [[0, -1.1], [1.1, 0.9], [-1.1, 0.9]],
    diamond: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
  }[marker];
  if (!corners) path.arc(x, y, size, 0, 7);
  else corners.forEach(([dx, dy], i) => path[i ? "lineTo" : "moveTo"](x + dx * size, y + dy * size));
  path.closePath();
  return path;
}

export class LossChart {
  constructor(root) {
    this.root = root;
    this.place = root.querySelector("[data-plot]");
    this.said = root.querySelector("[role=status]");
    this.base = root.dataset.baseLoss ? Number(root.dataset.baseLoss) : null;
    this.runs = new Map();
    for (const item of root.querySelectorAll("[data-run]")) {
      const { run, dash, marker, name } = item.dataset;
      this.runs.set(run, { item, marker, name, dash: dash ? dash.split(" ").map(Number) : [], train: new Map(), validation: new Map(), shown: true });
    }
    this.controls();
    this.keys();
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
    new MutationObserver(() => this.build()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    this.build();
  }

  // Points come in any order and may repeat: the last told of a step counts.
  add(points) {
    for (const point of points) {
      const run = this.runs.get(point.run);
      if (!run || !run[point.kind]) continue;
      run[point.kind].set(point.step, point);
      run.tables = null;
    }
    this.soon();
  }

  rewind(id, step) {
    const run = this.runs.get(id);
    if (!run) return;
    for (const kept of [run.train, run.validation])
      for (const key of kept.keys()) if (key > step) kept.delete(key);
    run.tables = null;
    this.soon();
  }

  setBase(loss) {
    if (loss === this.base) return;
    this.base = loss;
    const item = this.root.querySelector("[data-base]");
    item.hidden = false;
    item.querySelector("[data-base-read]").textContent = figure(loss);
    this.soon();
  }

  controls() {
    const asked = new URLSearchParams(location.search);
    const form = this.root.querySelector("[data-controls]");
    this.form = form;
    const off = new Set((asked.get("off") ?? "").split(" "));
    if (AXES[asked.get("x")]) form.elements.x.value = asked.get("x");
    form.elements.log.checked = asked.has("log");
    if (asked.get("smooth")) form.elements.smooth.value = asked.get("smooth");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      this.keep();
      for (const run of this.runs.values()) run.tables = null;
      this.build();
    });
    for (const [id, run] of this.runs) {
      const toggle = run.item.querySelector("[data-toggle]");
      if (!toggle) continue;
      run.shown = toggle.checked = !off.has(id);
      toggle.addEventListener("change", () => {
        run.shown = toggle.checked;
        this.keep();
        this.build();
      });
    }
  }

  // What is chosen stands in the address, so that it can be handed on; defaults do not.
  keep() {
    const { x, log, smooth } = this.form.elements;
    const query = new URLSearchParams(location.search);
    const off = [...this.runs].filter(([, run]) => !run.shown).map(([id]) => id).join(" ");
    for (const [key, value] of [["x", x.value === "step" ? "" : x.value], ["log", log.checked ? "1" : ""], ["smooth", smooth.value === "0.6" ? "" : smooth.value], ["off", off]])
      value ? query.set(key, value) : query.delete(key);
    history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}`);
  }

  keys() {
    this.place.addEventListener("keydown", (event) => {
      const xs = this.data[0];
      const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
      if (jump === undefined || !xs.length) return;
      event.preventDefault();
      const from = this.plot.cursor.idx ?? (jump > 0 ? -1 : xs.length);
      const index = Math.max(0, Math.min(xs.length - 1, from + jump));
      this.plot.setCursor({ left: this.plot.valToPos(xs[index], "x"), top: 1 });
    });
    this.place.addEventListener("blur", () => this.plot.setCursor({ left: -10, top: -10 }));
  }

  soon() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.gather();
      this.allowLog();
      this.plot.setData(this.data);
      this.read(null);
    }, REDRAW_MS);
  }

  tables(run) {
    if (run.tables) return run.tables;
    const x = AXES[this.form.elements.x.value][1];
    const table = (kept) => {
      const points = [...kept.values()].sort((a, b) => a.step - b.step);
      return { points, xs: points.map(x), losses: points.map((point) => point.loss) };
    };
    const [train, validation] = [table(run.train), table(run.validation)];
    train.smooth = smoothed(train.losses, Number(this.form.elements.smooth.value));
    return (run.tables = { train, validation });
  }

  gather() {
    const parts = [[[]]];
    for (const run of this.runs.values()) {
      const { train, validation } = this.tables(run);
      parts.push([train.xs, train.losses, train.smooth], [validation.xs, validation.losses]);
    }
    this.data = uPlot.join(parts);
  }

  // A logarithm needs values above zero; the reason stands beside the switch.
  allowLog() {
    const { log } = this.form.elements;
    const low = [...this.runs.values()].some((run) => Object.values(this.tables(run)).some((table) => table.losses.some((loss) => loss !== null && loss <= 0)));
    log.disabled = low;
    log.parentElement.title = low ? "A loss of 0 has no logarithm." : "";
    if (low && log.checked) {
      log.checked = false;
      this.build();
    }
  }

  size() {
    return { width: Math.max(240, this.place.clientWidth), height: this.place.clientWidth < 480 ? 240 : 320 };
  }

  build() {
    this.gather();
    const colours = getComputedStyle(this.place);
    const [ink, line, font] = [colours.color, colours.borderTopColor, `12px ${colours.fontFamily}`];
    const { x, log, smooth } = this.form.elements;
    smooth.nextElementSibling.textContent = Number(smooth.value).toFixed(2);
    const series = [{}];
    for (const run of this.runs.values()) {
      run.colour = getComputedStyle(run.item).getPropertyValue("--method").trim() || ink;
      const drawn = { stroke: run.colour, show: run.shown, points: { show: false } };
      series.push({ ...drawn, width: 1, alpha: 0.25 }, { ...drawn, width: 2, dash: run.dash }, { ...drawn, width: 1, alpha: 0.6, dash: run.dash });
    }
    const axis = { stroke: ink, font, labelFont: font, labelSize: 18, ticks: { stroke: line, width: 1, size: 4 }, grid: { stroke: line, width: 1 } };
    this.plot?.destroy();
    this.plot = new uPlot({
      ...this.size(),
      padding: [12, 24, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
      scales: { x: { time: false, range: (_, low, high) => (low === high ? [low ?? 0, (low ?? 0) + 1] : [low, high]) }, y: log.checked ? { distr: 3 } : { range: (_, low, high) => this.range(low, high) } },
      axes: [{ ...axis, label: AXES[x.value][0], size: 34 }, { ...axis, label: "Loss, nats per token", size: 48 }],
      series,
      hooks: { draw: [() => this.draw()], setCursor: [(plot) => this.read(plot.cursor.idx)] },
    }, this.data, this.place);
    this.read(null);
  }

  range(low, high) {
    if (this.base !== null) [low, high] = [Math.min(low ?? this.base, this.base), Math.max(high ?? this.base, this.base)];
    if (low === null) return [0, 1];
    // A flat curve, but for rounding: without room around it uPlot finds no ticks.
    const span = high - low > 1e-6 * Math.abs(high) ? high - low : Math.abs(high) || 1;
    const room = span * 0.06;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  // What lines do not show: validation markers, the best one ringed, losses that are no number, the base model.
  draw() {
    const { plot } = this;
    const { ctx, bbox } = plot;
    const scale = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 10 * scale, bbox.top - 10 * scale, bbox.width + 20 * scale, bbox.height + 20 * scale);
    ctx.clip();
    ctx.lineWidth = 1.5 * scale;
    if (this.base !== null) {
      const y = plot.valToPos(this.base, "y", true);
      ctx.strokeStyle = getComputedStyle(this.place).color;
      ctx.setLineDash([1 * scale, 3 * scale]);
      ctx.stroke(new Path2D(`M${bbox.left} ${y}H${bbox.left + bbox.width}`));
      ctx.setLineDash([]);
      ctx.font = `${12 * scale}px ${getComputedStyle(this.place).fontFamily}`;
      ctx.fillStyle = ctx.strokeStyle;
      [ctx.textAlign, ctx.textBaseline] = ["right", "bottom"];
      ctx.fillText("base model", bbox.left + bbox.width, y - 2 * scale);
    }
    for (const run of this.runs.values()) if (run.shown) this.marks(run, ctx, bbox, scale);
    ctx.restore();
  }

  marks(run, ctx, bbox, scale) {
    const { train, validation } = this.tables(run);
    ctx.strokeStyle = ctx.fillStyle = run.colour;
    const finite = validation.losses.filter((loss) => loss !== null);
    const best = validation.losses.indexOf(Math.min(...finite));
    validation.xs.forEach((x, i) => {
      if (validation.losses[i] === null) return;
      const at = [this.plot.valToPos(x, "x", true), this.plot.valToPos(validation.losses[i], "y", true)];
      ctx.fill(shape(run.marker, ...at, 4 * scale));
      if (i === best) ctx.stroke(shape("circle", ...at, 8 * scale));
    });
    for (const table of [train, validation])
      table.losses.forEach((loss, i) => {
        if (loss !== null) return;
        const [x, y, r] = [this.plot.valToPos(table.xs[i], "x", true), bbox.top + 8 * scale, 4 * scale];
        ctx.stroke(new Path2D(`M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`));
      });
  }

  // The read-out: at the cursor, else the newest of each run.
  read(index) {
    const at = index === null || index === undefined ? null : this.data[0][index];
    const told = [];
    for (const run of this.runs.values()) {
      const { train, validation } = this.tables(run);
      const nearest = (table) => {
        if (at === null) return table.xs.length - 1;
        let found = -1;
        table.xs.forEach((x, i) => { if (found < 0 || Math.abs(x - at) < Math.abs(table.xs[found] - at)) found = i; });
        return found;
      };
      const [t, v] = [nearest(train), nearest(validation)];
      const words = [];
      if (t >= 0) words.push(`${figure(train.smooth[t])} (raw ${figure(train.losses[t])})`);
      if (v >= 0) words.push(`validation ${figure(validation.losses[v])} at step ${validation.points[v].step}`);
      run.item.querySelector("[data-read]").textContent = words.join(", ");
      if (words.length) told.push(`${run.name}: ${words.join(", ")}`);
    }
    const where = this.root.querySelector("[data-at]");
    where.textContent = at === null ? "newest" : AXES[this.form.elements.x.value][2](at);
    clearTimeout(this.telling);
    if (at !== null && document.activeElement === this.place)
      this.telling = setTimeout(() => { this.said.textContent = `${where.textContent}. ${told.join(". ")}`; }, 500);
  }
}
