
// Draws the plots of the page and sorts its tables. Whatever it shows was named by somebody else:
// text is set as text and attributes as attributes, nothing is ever read as HTML.
"use strict";

const { document: report, subject, targets, waterfall } = JSON.parse(
  document.getElementById("data").textContent
);
const metric = report.task.metric ?? "accuracy";
const higher = report.task.higher_is_better !== false;

// Numbers and names in words, as in the tables. `null` is "n/a" everywhere.

const given = (show) => (value) => (value == null ? "n/a" : show(value));
const figures = given((value) => {
  const rounded = Number(value.toPrecision(3));
  return rounded && value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(Math.abs(rounded)))));
});
const scaled = (units) => given((value) => {
  const last = units.length - 1;
  const at = Math.min(last, Math.max(0, Math.floor(Math.log10(Number(value.toPrecision(3))) / 3)));
  return (at || value % 1 ? figures(value / 1000 ** at) : value) + units[at];
});
const count = scaled(["", "k", "M", "G", "T"]);
const size = scaled([" B", " KB", " MB", " GB", " TB"]);
const score = given((value) =>
  !value || (Math.abs(value) >= 0.001 && Math.abs(value) < 10)
    ? value.toFixed(4) : String(Number(value.toPrecision(4)))
);
const milliseconds = given((value) => `${figures(value)} ms`);
const signed = (show) => given((value) => (value < 0 ? "-" : "+") + show(Math.abs(value)));
const fixed = (places) => given((value) => value.toFixed(places));

const plain = (text) => String(text).replace(/\p{C}/gu, "");
const short = (text, most = 24) => {
  const letters = [...plain(text)];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : letters.join("");
};

const row = (artifact, target) => target && report.measurements.find((one) =>
  one.artifact === artifact.name && !("skipped" in one) &&
  ["runtime", "provider", "batch", "threads"].every((field) => one[field] === target[field])
);

// Elements.

const SHAPES = new Set(["svg", "g", "line", "path", "circle", "rect", "text"]);

function make(tag, attributes = {}, ...children) {
  const node = SHAPES.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const hint = (figure, text) => figure.append(make("p", { class: "hint" }, text));

/** Says `title` and `rows` ([what, figure] pairs) beside `node` while it is pointed at. */
function tell(figure, node, title, rows) {
  const tip = figure.querySelector(".tip") ?? figure.appendChild(make("div", { class: "tip" }));
  const shown = rows.filter(([, value]) => value != null);
  tip.hidden = true;
  const show = () => {
    const entries = shown.flatMap(([what, value]) => [make("dt", {}, what), make("dd", {}, value)]);
    tip.replaceChildren(make("b", {}, plain(title)), make("dl", {}, ...entries));
    tip.hidden = false;
    const around = figure.getBoundingClientRect(), box = node.getBoundingClientRect();
    const middle = (box.left + box.right) / 2 - around.left;
    const right = middle + 14 + tip.offsetWidth < around.width;
    const left = Math.max(6, middle - 14 - tip.offsetWidth);
    tip.style.left = `${right ? middle + 14 : left}px`;
    tip.style.top = `${(box.top + box.bottom) / 2 - around.top + 14}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, hide);
  node.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  const words = shown.map(([what, value]) => `${what} ${value}`);
  for (const [name, value] of [["tabindex", "0"], ["role", "img"]]) node.setAttribute(name, value);
  node.setAttribute("aria-label", `${plain(title)}: ${words.join(", ")}`);
}

/** Calls `draw(canvas, width)` now and whenever the width changes; a plot is never just scaled. */
function responsive(parent, draw) {
  const canvas = parent.appendChild(make("div", { class: "canvas" }));
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(canvas.clientWidth);
    if (width && width !== drawn) {
      drawn = width;
      canvas.replaceChildren();
      draw(canvas, width);
    }
  };
  new ResizeObserver(redraw).observe(canvas);
  redraw();
  return () => { drawn = 0; redraw(); };
}

function choose(parent, label, options, change) {
  const entries = options.map((text, at) => make("option", { value: at }, short(text, 60)));
  const select = make("select", {}, ...entries);
  select.addEventListener("change", () => change(Number(select.value)));
  parent.append(make("label", {}, `${label} `, select));
}

// Axes.

/** Where values lie between 0 and 1; logarithmic where they span more than a factor of ten. */
function axis(values, { room = 0.08, straight = false } = {}) {
  const low = Math.min(...values), high = Math.max(...values);
  const log = !straight && low > 0 && high > 10 * low;
  const to = log ? Math.log10 : Number;
  const span = to(high) - to(low) || Math.abs(to(high)) * 0.1 || 1;
  const [start, end] = [to(low) - room * span, to(high) + room * span];
  const ticks = [];
  const about = 10 ** Math.floor(Math.log10((end - start) / 5));
  const step = about * [1, 2, 5, 10].find((factor) => (end - start) / (about * factor) <= 6);
  if (log) {
    const steps = end - start > 3 ? [1] : [1, 2, 5];
    for (let power = Math.floor(start); power <= end; power++) {
      ticks.push(...steps.map((factor) => factor * 10 ** power));
    }
  } else {
    for (let at = Math.ceil(start / step); at * step <= end; at++) ticks.push(at * step);
  }
  const places = Math.max(0, -Math.floor(Math.log10(step)));
  return {
    at: (value) => (to(value) - start) / (end - start),
    ticks: ticks.filter((tick) => to(tick) >= start && to(tick) <= end),
    show: (tick) => (log ? String(Number(tick.toPrecision(3))) : tick.toFixed(places)),
  };
}

/** An SVG with grid and ticks. `x` and `y` are axes; `flip` puts low values of `y` on top. */
function frame(canvas, width, height, x, y, { label, across, up, flip = false, show }) {
  const box = { left: 62, right: width - 14, top: 26, bottom: height - 46 };
  const at = {
    x: (value) => box.left + x.at(value) * (box.right - box.left),
    y: (value) => box.bottom - (flip ? 1 - y.at(value) : y.at(value)) * (box.bottom - box.top),
  };
  const svg = make("svg", { width, height, role: "group", "aria-label": label });
  const rule = (x1, y1, x2, y2) => svg.append(make("line", { class: "grid", x1, y1, x2, y2 }));
  const say = (x, y, anchor, text) =>
    svg.append(make("text", { x, y, "text-anchor": anchor }, text));
  const trimmed = (text) => text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");
  let free = -Infinity;
  for (const tick of x.ticks) {
    rule(at.x(tick), box.top, at.x(tick), box.bottom);
    if (at.x(tick) < free) continue;  // no room on a phone
    say(at.x(tick), box.bottom + 18, "middle", show ? trimmed(show(tick)) : x.show(tick));
    free = at.x(tick) + 52;
  }
  for (const tick of y.ticks) {
    rule(box.left, at.y(tick), box.right, at.y(tick));
    say(box.left - 8, at.y(tick) + 4, "end", y.show(tick));
  }
  say((box.left + box.right) / 2, height - 6, "middle", short(across, Math.floor(width / 8)));
  say(4, 12, "start", short(up, Math.floor(width / 8)));
  canvas.append(svg);
  return { svg, at, box };
}

// Tables.

/** What a cell sorts by: a number where it begins with one; `null`, always last, for "n/a". */
function rank(cell) {
  const text = cell.textContent.trim();
  if (text === "n/a" || text === "") return null;
  if (text === "reference") return 1;
  const found = /^([+-]?\d+(?:\.\d+)?)(x|%)?(?: ?([kKMGT])B?| B)?(?![^\s])/.exec(text);
  return found ? found[1] * 1000 ** " KMGT".indexOf((found[3] ?? " ").toUpperCase()) : text;
}

function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((header, at) => {
    const button = make("button", { type: "button" }, ...header.childNodes);
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = header.getAttribute("aria-sort") !== "ascending", sign = rising ? 1 : -1;
      const rows = [...body.rows].map((row) => [rank(row.cells[at]), row]);
      const numbers = rows.every(([value]) => value === null || typeof value === "number");
      const words = new Intl.Collator(undefined, { numeric: true });
      const order = (a, b) => (numbers ? a - b : words.compare(a, b));
      rows.sort(([a], [b]) =>
        (a === null) - (b === null) || (a === null ? 0 : sign * order(a, b)));
      for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.append(...rows.map(([, row]) => row));
    });
  });
}

for (const table of document.querySelectorAll("table")) sortable(table);
