
// The plots themselves, one function each; page.js, in the same script, has what they are made of.

// Accuracy against cost.

const judged = report.artifacts.some((artifact) => !("skipped" in artifact.accuracy));

const COSTS = [
  ...targets.map((target) => ({
    label: `p50 latency, ms (${target.label})`,
    of: (artifact) => row(artifact, target)?.latency_ms.p50,
    gain: (artifact) => row(artifact, target)?.speedup,
    target,
  })),
  { label: "file size", of: (artifact) => artifact.size_bytes, show: size },
  { label: "parameters", of: (artifact) => artifact.params, show: count },
  { label: "MACs for one example", of: (artifact) => artifact.macs, show: count },
  {
    label: `peak memory (${targets[0]?.label})`,
    of: (artifact) => row(artifact, targets[0])?.peak_rss_bytes,
    show: size,
  },
].filter((cost) => report.artifacts.some((artifact) => cost.of(artifact) != null));

/** The artifacts that have both a cost and a height, with the ends of their intervals. */
function points(cost) {
  const found = report.artifacts.flatMap((artifact) => {
    const { accuracy, fidelity } = artifact, x = cost.of(artifact);
    const y = judged ? accuracy[metric] : fidelity?.sqnr_db;
    const exact = !judged && fidelity != null && y == null;
    if (x == null || (y == null && !exact)) return [];
    const lost = judged ? accuracy.drop : null, gain = cost.gain?.(artifact);
    // A drop is absolute where higher is better, and relative to the reference for errors.
    const scale = higher ? -1 : Math.abs(report.artifacts[0].accuracy[metric] || 1);
    const ends = lost
      ? [lost.low, lost.high].map((end) => y + scale * (end - lost.value)) : [y, y];
    const sides = gain?.low && gain?.high
      ? [gain.high, gain.low].map((end) => x * gain.value / end) : [x, x];
    return [{ artifact, x, y, exact, ends, sides }];
  });
  const heights = found.filter((point) => !point.exact).map((point) => point.y);
  const top = Math.max(0, ...heights), span = top - Math.min(top, ...heights);
  for (const point of found) {
    // Infinitely good: above all others.
    if (point.exact) [point.y, point.ends] = [top + (span || 1) / 4, []];
  }
  return found;
}

function facts(artifact, target) {
  const found = row(artifact, target), { accuracy, fidelity } = artifact, gain = found?.speedup;
  const own = gain?.versus === artifact.name, lost = accuracy.drop;
  const ends = (places, one) => `[${fixed(places)(one.low)}, ${fixed(places)(one.high)}]`;
  const dB = fidelity && (fidelity.sqnr_db == null ? "exact" : `${fixed(1)(fidelity.sqnr_db)} dB`);
  const kept = "skipped" in accuracy ? null : score(accuracy[metric]);
  return [
    [plain(metric), kept],
    ["drop [95 %]", lost && `${signed(fixed(4))(lost.value)} ${ends(4, lost)}`],
    ["SQNR", dB],
    ["p50", found && milliseconds(found.latency_ms.p50)],
    ["p90", found && milliseconds(found.latency_ms.p90)],
    ["p99", found && milliseconds(found.latency_ms.p99)],
    ["speed-up [95 %]", own ? "reference" : gain && `${fixed(2)(gain.value)}x ${ends(2, gain)}`],
    ["verdict", own ? null : gain?.verdict],
    ["inferences/s", found && count(found.throughput_per_s)],
    ["peak memory", found && size(found.peak_rss_bytes)],
    ["size", size(artifact.size_bytes)],
    ["parameters", count(artifact.params)],
    ["MACs", count(artifact.macs)],
  ];
}

function pareto(figure) {
  let cost = COSTS[0];
  if (!cost) return hint(figure, "Nothing was measured.");
  const flip = judged && !higher, what = judged ? plain(metric) : "SQNR against the model, dB";
  hint(figure, "Bars: 95 % intervals. Dashed: the pareto front. Up and left is better. " +
    "Point at an artifact, or tab to it, for its figures.");
  let within = false, again = null;
  choose(figure, "against", COSTS.map((one) => one.label), (at) => {
    cost = COSTS[at];
    again();
  });
  // One that lost much leaves the others no height to differ in.
  if (report.artifacts.some((artifact) => artifact.within_budget === false)) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      within = box.checked;
      again();
    });
    figure.append(make("label", {}, box, " only those within the budget"));
  }
  again = responsive(figure, (canvas, width) => {
    const found = points(cost).filter(({ artifact }) => !within || artifact.within_budget);
    if (!found.length) return;
    const x = axis(found.flatMap((point) => [point.x, ...point.sides]), { room: 0.12 });
    const heights = found.flatMap((point) => [point.y, ...point.ends]);
    const y = axis(heights, { room: 0.12, straight: true });
    const { svg, at, box } = frame(canvas, width, width < 500 ? 340 : 430, x, y, {
      label: `${what} against ${cost.label}, ${found.length} artifacts`,
      across: cost.label, up: what + (flip ? " (lower is better)" : ""), flip, show: cost.show,
    });
    const better = (one, other) => (flip ? one.y < other.y : one.y > other.y);
    const front = [];
    for (const point of [...found].sort((a, b) => a.x - b.x || (better(a, b) ? -1 : 1))) {
      if (!front.length || better(point, front.at(-1))) front.push(point);
    }
    const spots = front.map((point) => [at.x(point.x), at.y(point.y)]);
    const path = spots.map(([x, y], i) => (i ? `H${x}V${y}` : `M${x},${y}`)).join("");
    svg.append(make("path", { class: "front", d: path }));
    for (const point of [...found].sort((a, b) => a.artifact.best - b.artifact.best)) {
      const cx = at.x(point.x), cy = at.y(point.y), marked = point.artifact.best;
      const [x1, x2] = point.sides.map(at.x), [y1, y2] = point.ends.map(at.y);
      const node = make("g", { class: marked ? "point best" : "point" },
        make("line", { x1, x2, y1: cy, y2: cy }),
        ...(point.exact ? [] : [make("line", { x1: cx, x2: cx, y1, y2 })]),
        make("circle", { cx, cy, r: 16, class: "reach" }),
        make("circle", { cx, cy, r: marked ? 8 : 5.5 }));
      const title = plain(point.artifact.name) + (marked ? ", recommended" : "");
      tell(figure, node, title, facts(point.artifact, cost.target ?? targets[0]));
      svg.append(node);
      point.spot = [cx, cy];
    }
    names(svg, box, found);
  });
}

/** Writes each name beside its point where it hides least, the recommended one first. */
function names(svg, box, found) {
  const taken = found.map(({ spot: [x, y] }) => [x - 9, y - 9, x + 9, y + 9]);
  const shared = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
    Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  for (const point of [...found].sort((a, b) => b.artifact.best - a.artifact.best)) {
    const [x, y] = point.spot, marked = point.artifact.best;
    const words = short(point.artifact.name) + (point.exact ? " (exact)" : marked ? " ★" : "");
    const text = make("text", { class: marked ? "name best" : "name" }, words);
    svg.append(text);
    const long = text.getComputedTextLength();
    let chosen = null, least = Infinity;
    for (const rise of [-14, 14, -32, 32, -50, 50, -68, 68]) {
      for (const left of [x + 10, x - 10 - long, x - long / 2]) {
        const place = [left, y + rise - 9, left + long, y + rise + 6];
        const inside = shared(place, [box.left, box.top, box.right, box.bottom]);
        const hidden = taken.reduce((sum, other) => sum + shared(place, other), 15 * long - inside);
        if (hidden < least - 1) [chosen, least] = [place, hidden];
      }
    }
    taken.push(chosen);
    text.setAttribute("x", chosen[0]);
    text.setAttribute("y", chosen[3] - 3);
    const x2 = Math.min(Math.max(x, chosen[0]), chosen[2]);
    const y2 = chosen[3] < y ? chosen[3] : chosen[1];
    if (Math.abs(y2 - y) > 16) {  // in a crowd only a line tells whose name it is
      svg.prepend(make("line", { class: "leader", x1: x, y1: y, x2, y2 }));
    }
  }
}

// What each stage gave and cost.

function stages(figure) {
  const panels = [
    { key: "accuracy", title: plain(metric), show: score, up: higher },
    { key: "ms", title: `p50 latency (${targets[0]?.label})`, show: milliseconds, zero: true },
    { key: "bytes", title: "file size", show: size, zero: true },
  ].filter(({ key }) => waterfall.some((step) => step[key] != null));
  hint(figure, "Each bar is what a stage changed: blue is better, amber worse, grey what is left.");
  const holder = figure.appendChild(make("div", { class: "panels" }));
  for (const { key, title, show, up = false, zero = false } of panels) {
    const panel = holder.appendChild(make("div", {}, make("h4", {}, title)));
    responsive(panel, (canvas, width) => {
      const levels = waterfall.map((step) => step[key]).filter((level) => level != null);
      const scale = axis(zero ? [0, ...levels] : levels, { room: zero ? 0 : 0.1, straight: true });
      const at = (level) => 2 + scale.at(level) * (width - 4);
      const height = 52 * waterfall.length;
      const svg = make("svg", { width, height, role: "group", "aria-label": `${title} by stage` });
      let before = null;
      waterfall.forEach((step, i) => {
        const level = step[key], top = 52 * i + 26;
        const change = level == null || before == null ? null : level - before;
        const side = !change ? "name" : change > 0 === up ? "gain" : "cost";
        const said = change == null ? show(level) : `${show(level)}  (${signed(show)(change)})`;
        const node = make("g", { class: "point" },
          make("text", { class: "name", x: 0, y: top - 6 }, short(step.artifact, 16)),
          make("text", { class: side, x: width, y: top - 6, "text-anchor": "end" }, said),
          make("rect", { class: "reach", x: 0, y: top - 20, width, height: 40, opacity: 0 }));
        if (level != null) {
          const [from, to] = [before ?? level, level].map(at);
          if (zero) {
            node.append(make("rect", { class: "level", x: 2, y: top, width: to - 2, height: 14 }));
          }
          node.append(
            make("rect", { class: side, x: Math.min(from, to), y: top, height: 14,
              width: Math.abs(to - from) }),
            make("line", { x1: to, x2: to, y1: top - 2, y2: top + 16 }));
          before = level;
        }
        tell(figure, node, step.artifact, [
          ["stage", step.stage && plain(step.stage)], [title, show(level)],
          ["change", change == null ? null : signed(show)(change)],
        ]);
        svg.append(node);
      });
      canvas.append(svg);
    });
  }
}

// Lines.

/** `series`: a name and points of x, y (null: a gap) and `rows` for the tooltip. */
function lines(figure, series, { title, across, up, whole = false, zero = false }) {
  const drawn = series.map((one) => one.points.filter((point) => point.y != null)).flat();
  if (!drawn.length) return;
  const panel = figure.appendChild(make("div", {}, make("h4", {}, plain(title))));
  const shade = (name, i) => (name === subject ? "best" : `s${i % 5}`);
  panel.append(...series.map(({ name }, i) =>
    make("span", { class: `key ${shade(name, i)}` }, short(name))));
  const r = drawn.length > 40 * series.length ? 2.5 : 4;
  responsive(panel, (canvas, width) => {
    const x = axis(drawn.map((point) => point.x), { room: 0.05, straight: true });
    if (whole) {
      x.ticks = x.ticks.filter(Number.isInteger);
      x.show = String;
    }
    const y = axis([...drawn.map((point) => point.y), ...(zero ? [0] : [])]);
    const { svg, at } = frame(canvas, width, 280, x, y, { label: plain(title), across, up });
    series.forEach(({ name, points }, i) => {
      const parts = points.map((point, j) => (point.y == null ? ""
        : `${j && points[j - 1].y != null ? "L" : "M"}${at.x(point.x)},${at.y(point.y)}`));
      svg.append(make("path", { class: `curve ${shade(name, i)}`, d: parts.join("") }));
      for (const point of points.filter(({ y }) => y != null)) {
        const node = make("g", { class: `point ${shade(name, i)}` },
          make("circle", { cx: at.x(point.x), cy: at.y(point.y), r: 12, class: "reach" }),
          make("circle", { cx: at.x(point.x), cy: at.y(point.y), r }));
        tell(figure.closest(".plot"), node, name, point.rows);
        svg.append(node);
      }
    });
  });
}

function curves(figure) {
  const seen = new Set(), series = [];
  for (const { name, steps } of report.artifacts) {
    for (const step of steps) {
      const key = JSON.stringify(step), history = step.facts?.history;
      if (!Array.isArray(history) || seen.has(key)) continue;
      seen.add(key);  // an artifact repeats the steps of the one that it was made from
      series.push({ name, stage: step.stage, history });
    }
  }
  const holder = figure.appendChild(make("div", { class: "panels" }));
  const metric = report.task.metric ?? "accuracy", drawn = ["loss", metric, `train_${metric}`];
  const keys = new Set(series.flatMap(({ history }) => history.flatMap(Object.keys)));
  for (const key of keys) {
    if (!drawn.includes(key)) continue;  // rates and seconds are no curves
    const rows = (entry, stage) => [["stage", plain(stage)], ["epoch", String(entry.epoch)],
      ...Object.entries(entry).filter(([name]) => name !== "epoch")
        .map(([name, value]) => [plain(name), score(value)])];
    lines(holder, series.map(({ name, stage, history }) => ({
      name,
      points: history.map((entry) => ({ x: entry.epoch, y: entry[key], rows: rows(entry, stage) })),
    })), { title: key, across: "epoch", up: "", whole: true });
  }
}

function load(figure) {
  const series = report.artifacts.flatMap((artifact) => {
    const curve = row(artifact, targets[0])?.load_curve;
    return curve ? [{ name: artifact.name, points: curve.map((one) => ({
      x: one.offered_per_s, y: one.p99,
      rows: [
        ["offered", `${count(one.offered_per_s)}/s`], ["served", `${count(one.served_per_s)}/s`],
        ["p50", milliseconds(one.p50)], ["p99", milliseconds(one.p99)], ["n", String(one.n)],
      ],
    })) }] : [];
  });
  lines(figure, series, {
    title: `on ${targets[0]?.label}`, across: "offered calls per second", up: "p99, ms",
  });
}

// The worst examples.

function worst(figure) {
  const hurt = report.artifacts.filter((artifact) => artifact.worst?.length);
  if (!hurt.length) return;
  hurt.sort((a, b) => (b.name === subject) - (a.name === subject));
  const gallery = make("div", { class: "gallery" });
  const show = (at) => gallery.replaceChildren(...hurt[at].worst.map((one) => {
    const said = [["", `example ${one.example}`], ["", `target: ${plain(one.target)}`],
      ["", `baseline: ${plain(one.baseline)}`], ["wrong", `here: ${plain(one.output)}`],
      ["", `lost ${figures(one.lost)}`]];
    const words = said.map(([style, text]) => make("div", style ? { class: style } : {}, text));
    const alt = said.map(([, text]) => text).join(", ");
    // Base64 and nothing else may follow.
    const safe = /^[A-Za-z0-9+/]+=*$/.test(one.picture ?? "");
    const src = `data:image/png;base64,${one.picture}`;
    return make("div", {}, ...(safe ? [make("img", { src, alt })] : []), ...words);
  }));
  if (hurt.length > 1) choose(figure, "of", hurt.map((artifact) => artifact.name), show);
  figure.append(gallery);
  show(0);
}

const PLOTS = { pareto, waterfall: stages, curves, load, worst };
for (const figure of document.querySelectorAll(".plot")) {
  figure.querySelector(".hint").remove();  // it said that this script had to run
  PLOTS[figure.id](figure);
}
