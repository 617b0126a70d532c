// Curves of all runs that zoom together. Uses the helpers of page.js, which report.py puts after this file.

const FEW = 30; // a curve with fewer points, such as scores, has dots and is not smoothed
const MARGIN = {left: 52, right: 12, top: 10, bottom: 34}, HEIGHT = 230, LABEL = 13;
const last = ["loss", "grad_norm", "learning_rate", "skipped", "step_time"]; // data.losses come first

const view = {axis: "step", zoom: null, smooth: 0, log: false, hidden: new Set()};
const panels = [];
let toolbar;

function position(x) { // as text, on the chosen axis
  return view.axis === "step" ? x.toLocaleString("en") : number(x);
}

function points(run, column) { // [[x, y]] on the chosen axis
  const found = run.columns[column] || [];
  if (view.axis === "step") return found;
  const place = new Map(run.steps.map((step, i) => [step, i]));
  return found.map(([step, y]) => [run.hours[place.get(step)], y]);
}

function smoothed(found) {
  let sum = 0, weight = 0;
  return found.map(([x, y]) => {
    sum = view.smooth * sum + y;
    weight = view.smooth * weight + 1;
    return [x, sum / weight];
  });
}

function ticks(low, high, count) { // round numbers in [low, high]
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(m => m >= 0.9 * raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const m of [1, 2, 5]) if (m * 10 ** power >= low && m * 10 ** power <= high) found.push(m * 10 ** power);
  return found.length > 1 ? found : ticks(low, high, 4);
}

function short(value) { // of a tick
  if (Math.abs(value) >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (Math.abs(value) >= 1e4) return `${Number((value / 1e3).toPrecision(4))}K`;
  return String(Number(value.toPrecision(6)));
}

function thinned(found, toX) { // lowest and highest of each pixel column, which look like the whole line
  if (found.length < 1500) return found;
  const columns = new Map();
  for (const point of found) {
    const pixel = Math.round(toX(point[0])), known = columns.get(pixel);
    if (!known) columns.set(pixel, [point, point]);
    else if (point[1] < known[0][1]) known[0] = point;
    else if (point[1] > known[1][1]) known[1] = point;
  }
  return [...columns.values()].flatMap(pair => pair.sort((a, b) => a[0] - b[0]));
}

function extent(values) { // [low, high] with low < high; null without values
  if (!values.length) return null;
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return low < high ? [low, high] : [low - (Math.abs(low) || 1) / 20, high + (Math.abs(high) || 1) / 20];
}

const shown = () => data.runs.map((run, i) => [run, i]).filter(([, i]) => !view.hidden.has(i));
const stopAt = run => view.axis === "step" ? run.stop : hoursAt(run, run.stop);
function hoursAt(run, step) { // interpolated between two rows
  let i = run.steps.findIndex(known => known >= step);
  if (i < 0) i = run.steps.length - 1;
  const [a, b] = i ? [run.steps[i - 1], run.hours[i - 1]] : [0, 0];
  return b + (run.hours[i] - b) * (step - a) / (run.steps[i] - a || 1);
}

function draw(panel) {
  const {svg, column} = panel, width = svg.clientWidth || 430;
  const series = shown().map(([run, i]) => ({run, i, raw: points(run, column)})).filter(one => one.raw.length);
  const all = data.runs.flatMap(run => Object.keys(run.columns).flatMap(name => points(run, name).map(point => point[0])));
  const rangeX = view.zoom || [0, extent(all)[1]];
  const inside = ([x]) => x >= rangeX[0] && x <= rangeX[1];
  for (const one of series) one.line = view.smooth && one.raw.length >= FEW ? smoothed(one.raw) : one.raw;
  const values = series.flatMap(one => one.line.filter(inside).map(point => point[1]));
  let rangeY = extent(values) || [0, 1];
  const logarithmic = view.log && rangeY[0] > 0;
  const scale = logarithmic ? Math.log10 : y => y;
  let [low, high] = rangeY.map(scale);
  [low, high] = [low - 0.05 * (high - low), high + 0.05 * (high - low)];
  if (!logarithmic && rangeY[0] >= 0) low = Math.max(low, 0);
  const stops = shown().filter(([run]) => run.stop !== null && inside([stopAt(run)]));
  const top = MARGIN.top + (column === "denoise" ? LABEL * stops.length : 0); // labels of stops stand above the curves
  const w = width - MARGIN.left - MARGIN.right, tall = HEIGHT - top - MARGIN.bottom;
  const toX = x => MARGIN.left + w * (x - rangeX[0]) / (rangeX[1] - rangeX[0]);
  const toY = y => top + tall * (1 - (scale(y) - low) / (high - low));
  Object.assign(panel, {toX, series, rangeX, toValue: pixel => rangeX[0] + (pixel - MARGIN.left) / w * (rangeX[1] - rangeX[0])});

  const parts = [], bottom = HEIGHT - MARGIN.bottom, right = width - MARGIN.right;
  for (const y of logarithmic ? logTicks(10 ** low, 10 ** high) : ticks(low, high, 5))
    parts.push(s("line", {class: "grid", x1: MARGIN.left, x2: right, y1: toY(y), y2: toY(y)}),
      s("text", {x: MARGIN.left - 7, y: toY(y) + 4, "text-anchor": "end"}, short(y)));
  for (const x of ticks(...rangeX, Math.max(2, Math.floor(w / 60))))
    parts.push(s("line", {class: "axis", x1: toX(x), x2: toX(x), y1: bottom, y2: bottom + 4}),
      s("text", {x: toX(x), y: bottom + 16, "text-anchor": "middle"}, short(x)));
  parts.push(s("line", {class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom}),
    s("text", {x: right, y: HEIGHT - 4, "text-anchor": "end"}, view.axis === "step" ? "step" : "hours"));

  const clip = `clip-${column.replace(/\W/g, "-")}`;
  const curves = s("g", {"clip-path": `url(#${clip})`});
  stops.forEach(([run, i], row) => {
    const x = stopAt(run), label = column === "denoise"; // the other panels have the same lines, without text
    curves.append(s("line", {class: "stop", style: colour(i), x1: toX(x), x2: toX(x), y1: label ? MARGIN.top + LABEL * row : top, y2: bottom},
      s("title", {}, `${run.name}: alignment stops after step ${run.stop}`)));
    if (!label) return;
    const near = toX(x) > width / 2;
    const name = run.name.length > 16 ? `${run.name.slice(0, 15)}…` : run.name; // room on a phone
    parts.push(s("text", {x: toX(x) + (near ? -5 : 5), y: MARGIN.top + 9 + LABEL * row, "text-anchor": near ? "end" : "start"},
      data.runs.length > 1 ? `${name}: alignment stops` : "alignment stops"));
  });
  const path = found => thinned(found, toX).map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
  for (const {i, raw, line} of series) {
    const style = colour(i), dash = i < COLOURS ? null : "6 3", drawable = ([, y]) => !logarithmic || y > 0;
    if (line !== raw) curves.append(s("path", {class: "curve raw", style, d: path(raw.filter(drawable))}));
    curves.append(s("path", {class: "curve", style, "stroke-dasharray": dash, d: path(line.filter(drawable))}));
    if (line.length < FEW) for (const [x, y] of line.filter(drawable)) curves.append(s("circle", {style, cx: toX(x), cy: toY(y), r: 2.2}));
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", HEIGHT);
  svg.replaceChildren(s("clipPath", {id: clip}, s("rect", {x: MARGIN.left, y: MARGIN.top - 4, width: w + 4, height: HEIGHT - MARGIN.top - MARGIN.bottom + 7})), ...parts, curves);
}

function redraw() {
  panels.forEach(draw);
  toolbar.querySelector("#all").disabled = !view.zoom;
}

function zoom(range) {
  view.zoom = range;
  redraw();
}

function zoomBy(factor) { // around the middle, at most to the whole run
  const [low, high] = panels[0].rangeX, middle = (low + high) / 2, half = (high - low) / 2 * factor;
  const end = extent(data.runs.flatMap(run => view.axis === "step" ? run.steps : run.hours))[1];
  const range = [Math.max(0, middle - half), Math.min(end, middle + half)];
  zoom(range[0] <= 0 && range[1] >= end ? null : range);
}

function makePanel(column) {
  const svg = s("svg", {role: "img", "aria-label": `${data.titles[column] || column} along the run`});
  const tip = h("div", {class: "tip", hidden: true});
  const node = h("div", {class: "card panel", id: `panel-${column}`}, h("h3", {}, data.titles[column] || column), svg, tip);
  const panel = {svg, column};
  let from = null;
  const at = event => event.clientX - svg.getBoundingClientRect().left;
  const clean = () => svg.querySelectorAll(".hair, .zoom").forEach(part => part.remove());

  function hover(event) {
    const pixel = Math.min(Math.max(at(event), MARGIN.left), svg.clientWidth - MARGIN.right), x = panel.toValue(pixel);
    clean();
    if (from !== null)
      svg.append(s("rect", {class: "zoom", x: Math.min(from, pixel), width: Math.abs(pixel - from), y: 0, height: HEIGHT - MARGIN.bottom}));
    svg.append(s("line", {class: "hair", x1: pixel, x2: pixel, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom}));
    const rows = panel.series.map(({run, i, line}) => {
      const nearest = line.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      return h("div", {}, swatch(i), `${data.runs.length > 1 ? `${run.name} ` : ""}${number(nearest[1])} at ${position(nearest[0])}`);
    });
    tip.replaceChildren(...rows);
    tip.hidden = !rows.length;
    const plot = svg.getBoundingClientRect(), card = node.getBoundingClientRect(), left = plot.left - card.left + pixel + 14;
    tip.style.left = `${left + tip.offsetWidth < node.clientWidth ? left : Math.max(4, left - 28 - tip.offsetWidth)}px`;
    tip.style.top = `${plot.top - card.top + MARGIN.top}px`;
  }

  svg.addEventListener("pointerdown", event => {
    from = Math.max(at(event), MARGIN.left);
    if (event.isTrusted) svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", hover);
  svg.addEventListener("pointerup", event => {
    const range = [from, Math.min(at(event), svg.clientWidth - MARGIN.right)].sort((a, b) => a - b);
    const wide = from !== null && range[1] - range[0] > 8;
    from = null;
    clean();
    if (wide) zoom(range.map(panel.toValue));
  });
  for (const kind of ["pointerleave", "pointercancel"])
    svg.addEventListener(kind, () => { if (kind === "pointercancel") from = null; clean(); tip.hidden = true; });
  svg.addEventListener("dblclick", () => zoom(null));
  panels.push(panel);
  return node;
}

function makeToolbar() {
  const press = (name, on, change) => h("button", {type: "button", "aria-pressed": on, click: event => {
    const now = event.target.closest("button").getAttribute("aria-pressed") !== "true";
    event.target.closest("button").setAttribute("aria-pressed", now);
    change(now);
    redraw();
  }}, name);
  const chips = data.runs.map((run, i) => {
    const chip = press(h("span", {}, swatch(i), run.name), true, on => on ? view.hidden.delete(i) : view.hidden.add(i));
    chip.classList.add("chip");
    return chip;
  });
  const axes = ["step", "hours"].map(axis => h("button", {type: "button", "aria-pressed": axis === view.axis, click: () => {
    view.axis = axis;
    view.zoom = null;
    axes.forEach(button => button.setAttribute("aria-pressed", button.textContent === axis));
    redraw();
  }}, axis));
  toolbar = h("div", {class: "bar"}, chips, h("span", {class: "space"}),
    h("label", {}, "smooth ", h("input", {type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "smoothing",
      input: event => { view.smooth = Number(event.target.value); redraw(); }})),
    press("log", false, on => { view.log = on; }), h("span", {class: "group"}, axes),
    h("span", {class: "group"},
      h("button", {type: "button", "aria-label": "zoom in", click: () => zoomBy(0.5)}, "+"),
      h("button", {type: "button", "aria-label": "zoom out", click: () => zoomBy(2)}, "−"),
      h("button", {type: "button", id: "all", disabled: true, click: () => zoom(null)}, "all")));
  return toolbar;
}

function curves() {
  const known = [...new Set(data.runs.flatMap(run => Object.keys(run.columns)))];
  const columns = [...data.losses.filter(name => known.includes(name)),
    ...known.filter(name => ![...data.losses, ...last].includes(name)),
    ...last.filter(name => known.includes(name))];
  return [h("h2", {id: "curves"}, "Curves"),
    h("p", {class: "soft"}, "Drag across a plot to zoom all of them, double-click for the whole run; a dotted line is where alignment stops."),
    makeToolbar(), h("div", {class: "panels"}, columns.map(makePanel))];
}
