// Draws the page that report.py fills with data: no library, nothing fetched. Helpers, sections, and last the page.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 6; // --c0 to --c5; runs beyond that are dashed
const MAIN = ["preset", "model", "data_dir", "resolution", "batch_size", "max_train_steps", "learning_rate", "ema_decay", "mixed_precision",
  "enc_type", "enc_blocks", "encoder_depth", "projector", "spatial_norm", "attn_layers", ...data.weights, "early_stop_point",
  "early_stop_trigger", "align_decay", "path_type", "weighting", "qk_norm", "seed"]; // settings of a single run that are always visible

function element(namespace, name, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key.startsWith("aria-")) node.setAttribute(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (name, attributes, ...children) => element(null, name, attributes, children);
const s = (name, attributes, ...children) => element("http://www.w3.org/2000/svg", name, attributes, children);
const colour = i => `--run: var(--c${i % COLOURS})`;
const swatch = i => h("span", {class: i < COLOURS ? "swatch" : "swatch dashed", style: colour(i)});

function text(value) { // a setting, for a table
  if (value === null || value === undefined) return "–";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function number(value) { // four digits of a measurement; anything else as it is
  if (typeof value !== "number") return text(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function duration(hours) {
  const [value, unit] = hours < 1.5 ? [60 * hours, "min"] : [hours, "h"];
  return `${Number(value.toPrecision(3))} ${unit}`;
}

function table(head, rows) { // head: nodes or strings; rows: the same, the first of each a heading
  return h("div", {class: "scroll"}, h("table", {},
    h("thead", {}, h("tr", {}, head.map(cell => h("th", {}, cell)))),
    h("tbody", {}, rows.map(([name, ...cells]) => h("tr", {}, h("th", {}, name), cells.map(cell => h("td", {}, cell)))))));
}
const byRun = (name, rows) => table([name, ...data.runs.map((run, i) => h("span", {}, swatch(i), run.name))], rows);

// ---- head ----

function summary(run, i) {
  const done = run.steps[run.steps.length - 1], best = run.columns.denoise || [];
  const facts = [run.settings.model, `step ${done.toLocaleString("en")} of ${text(run.settings.max_train_steps)}`,
    duration(run.hours[run.hours.length - 1]), run.stop === null
      ? (data.losses.slice(1).some(name => run.columns[name]) ? "alignment on" : "no alignment") : `alignment stopped after step ${run.stop.toLocaleString("en")}`];
  if (best.length) facts.push(`denoising loss ${number(best[best.length - 1][1])}`);
  return h("p", {}, swatch(i), h("strong", {}, run.name), ` · ${[data.labels[i], ...facts].filter(Boolean).join(" · ")}`);
}

// ---- speed, settings, environment ----

function speed() {
  const phases = [...new Set(data.runs.flatMap(run => run.speed.map(([phase]) => phase)))];
  const cell = (run, phase) => {
    const found = run.speed.find(([name]) => name === phase);
    return found ? `${number(found[1])} ms a step, ${found[2] === null ? "–" : number(found[2])} images/s` : "–";
  };
  const total = data.runs.map(run => duration(run.hours[run.hours.length - 1]));
  return [h("h2", {id: "speed"}, "Step time and throughput"),
    h("div", {class: "card"}, byRun("", [...phases.map(phase => [phase, ...data.runs.map(run => cell(run, phase))]), ["training so far", ...total]]),
      h("p", {class: "soft"}, "Medians over the rows of metrics.csv without the first. A row includes the time of its previews and checkpoint."))];
}

function settings() {
  const names = [...new Set(data.runs.flatMap(run => Object.keys(run.settings)))];
  const cells = name => data.runs.map(run => text(run.settings[name]));
  const several = data.runs.length > 1, first = name => several ? new Set(cells(name)).size > 1 : MAIN.includes(name);
  const row = name => [name, ...cells(name)], rest = names.filter(name => !first(name));
  return [h("h2", {id: "settings"}, several ? "Settings that differ" : "Settings"),
    h("div", {class: "card"}, names.some(first) ? byRun("", names.filter(first).map(row)) : h("p", {}, "All settings are equal."),
      rest.length ? h("details", {}, h("summary", {}, `${rest.length} ${several ? "settings that are equal" : "other settings"}`),
        byRun("", rest.map(row))) : null)];
}

function environment() {
  const known = [...new Set(data.runs.flatMap(run => Object.keys(run.environment || {})))];
  return [h("h2", {id: "environment"}, "Environment"), h("div", {class: "card"},
    data.runs.filter(run => !run.environment).map(run => h("p", {}, `${run.name} was made by an older version, which did not record its environment.`)),
    known.length ? byRun("", known.map(name => [name, ...data.runs.map(run => text((run.environment || {})[name]))])) : null)];
}

// ---- pictures ----

const box = h("dialog", {click: () => box.close()});
let shelf = [], place = 0;
function show(list, i) {
  [shelf, place] = [list, (i + list.length) % list.length];
  const [title, picture] = shelf[place];
  box.replaceChildren(h("img", {src: picture, alt: title}), h("p", {}, title));
  if (!box.open) box.showModal();
}
document.addEventListener("keydown", event => {
  if (box.open && (event.key === "ArrowLeft" || event.key === "ArrowRight")) show(shelf, place + (event.key === "ArrowLeft" ? -1 : 1));
});

function previews() {
  const strip = run => h("div", {class: "strip"}, run.previews.map(([title, picture], i) => h("figure", {},
    h("img", {src: picture, alt: `${run.name}, ${title}`, click: () => show(run.previews, i)}), h("figcaption", {}, title))));
  return [h("h2", {id: "previews"}, "Previews over time"),
    h("p", {class: "soft"}, "Samples of the EMA weights, always from the same noise and conditions. The first picture shows data with these conditions."),
    data.runs.map((run, i) => [h("h3", {}, swatch(i), run.name), run.previews.length ? strip(run)
      : h("p", {}, "This run has no previews; --sampling-steps of the training makes them.")])];
}

function samples() {
  const list = data.samples.map(one => [one.caption || one.name, one.picture]);
  const scores = one => {
    const rows = Object.entries(one.scores);
    if (!rows.length) return null;
    const columns = Object.entries(rows[0][1]).flatMap(([reference, found]) => Object.keys(found).map(metric => [reference, metric]));
    return table(["", ...columns.map(([reference, metric]) => reference ? `${metric}, ${reference}` : metric)],
      rows.map(([name, found]) => [name, ...columns.map(([reference, metric]) => number((found[reference] || {})[metric]))]));
  };
  return [h("h2", {id: "samples"}, "Samples"), h("div", {class: "samples"}, data.samples.map((one, i) => h("figure", {class: "card"},
    h("img", {src: one.picture, alt: one.name, click: () => show(list, i)}),
    h("figcaption", {}, one.caption || one.name),
    scores(one))))];
}

// ---- student and teacher ----

const HEAT = [[10, 12, 40], [70, 30, 120], [170, 50, 110], [240, 120, 60], [253, 230, 140]];
function paint(canvas, row, side) { // a row of an attention map
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  row.forEach((value, i) => {
    const place = value / 255 * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = HEAT[low][c] + (place - low) * (HEAT[low + 1][c] - HEAT[low][c]);
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

function lookInside(run) {
  const found = run.inside;
  if (found.missing) return h("p", {}, found.missing);
  const side = found.side, chosen = {pair: found.pairs.length - 1}, rows = [], facts = h("p", {class: "soft"});
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  for (const pair of found.pairs) for (const kind of ["teacher_maps", "student_maps"]) pair[kind] = pair[kind].map(bytes);

  function refresh() {
    const pair = found.pairs[chosen.pair];
    facts.textContent = `Cross-entropy of the student's map against the teacher's ${number(pair.loss)} nats, of the teacher's against itself `
      + `${number(pair.entropy)}: the two are ${number(pair.loss - pair.entropy)} apart (mean over ${pair.heads} heads and these images).`;
    rows.forEach((row, i) => {
      for (const kind of ["teacher", "student"]) {
        const token = row.token, map = pair[`${kind}_maps`][i];
        paint(row[kind], map.slice(token * side * side, (token + 1) * side * side), side);
        row[`${kind}Label`].textContent = `${kind} ${pair[kind]}`;
      }
      const size = 100 / side;
      Object.assign(row.mark.style, {left: `${row.token % side * size}%`, top: `${Math.floor(row.token / side) * size}%`,
        width: `${size}%`, height: `${size}%`});
    });
  }

  function makeRow(picture, i) {
    const row = {token: Math.floor(side / 2) * side + Math.floor(side / 2), mark: h("span")};
    const cells = [], still = (source, name) => h("figure", {}, h("img", {src: source, alt: name}), h("figcaption", {}, name));
    const choose = event => {
      const frame = eye.getBoundingClientRect(), token = [event.clientY - frame.top, event.clientX - frame.left]
        .map(offset => Math.min(side - 1, Math.max(0, Math.floor(offset / frame.width * side))));
      row.token = token[0] * side + token[1];
      refresh();
    };
    const eye = h("div", {class: "eye", pointerdown: choose, pointermove: event => event.buttons && choose(event)},
      h("img", {src: picture, alt: "training image", draggable: "false"}), row.mark);
    cells.push(h("figure", {}, eye, h("figcaption", {}, "image")));
    for (const kind of ["teacher", "student"]) {
      row[kind] = h("canvas", {width: side, height: side, role: "img", "aria-label": `attention of the ${kind}`});
      row[`${kind}Label`] = h("figcaption");
      cells.push(h("figure", {}, row[kind], row[`${kind}Label`]));
    }
    if (found.cosine !== undefined)
      cells.push(still(found.teacher_colours[i], "teacher's features"), still(found.student_colours[i], "projected features"));
    rows.push(row);
    return h("div", {class: "view"}, cells);
  }

  const scale = h("p", {class: "soft scale"}, "attention: none ",
    h("span", {style: `background: linear-gradient(to right, ${HEAT.map(rgb => `rgb(${rgb})`).join(", ")})`}), " the largest of the map");
  const views = h("div", {class: "views"}, found.images.map(makeRow));
  const buttons = found.pairs.map((pair, i) => h("button", {type: "button", "aria-pressed": i === chosen.pair, click: () => {
    chosen.pair = i;
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
    refresh();
  }}, `student ${pair.student}, teacher ${pair.teacher}`));
  refresh();
  return [h("p", {class: "soft"}, `EMA weights of step ${found.step.toLocaleString("en")}, noise at t = ${found.t}.`
      + (found.cosine === undefined ? " There are no projected features in this run." : ` Cosine of projected and teacher's features ${number(found.cosine)}.`)),
    h("div", {class: "group"}, buttons), facts, scale, views];
}

function insides() {
  const seen = data.runs.some(run => !run.inside.missing);
  return [h("h2", {id: "inside"}, "What teacher and student see"),
    seen && h("p", {class: "soft"}, "Attention: where the marked patch looks, averaged over the aligned heads; brighter is more. Touch an image to move the mark. "
      + "Features: the first three principal components of the teacher's tokens as red, green and blue, and the student's projected "
      + "tokens along the same components: equal colours are equal features. Numbers are blocks, counted from 0."),
    data.runs.map((run, i) => h("div", {class: "card", style: "margin-top:.9rem"}, h("h3", {style: "margin-top:0"}, swatch(i), run.name), lookInside(run)))];
}

// ---- the page ----

document.title = data.title;
document.getElementById("page").replaceChildren(...[
  h("h1", {}, document.title), data.runs.map(summary), curves(), data.samples.length ? samples() : [], previews(), insides(), speed(),
  settings(), environment(), box].flat(Infinity).filter(node => node));
redraw();
new ResizeObserver(() => redraw()).observe(document.querySelector(".panels"));
