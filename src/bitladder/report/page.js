"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
// Plotly takes tags in a text for its own: a name is only shown.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const FLIPS_OFTEN = 0.1;
const MARKS = ["x", "cross", "triangle-up", "triangle-down", "star"];
const TONES = ["second", "third", "fourth", "fifth", "soft"];
const byName = Object.fromEntries(data.schemes.map((scheme) => [scheme.name, scheme]));
const quantised = (group, scheme) => group.formats[scheme] !== "bf16";

function fill(id, values, chosen) {
  const select = $(id);
  if (!select) return;
  for (const value of values) select.add(new Option(value, value, false, value === chosen));
}

function layout(height, extra) {
  const axis = { gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), automargin: true };
  return {
    height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: colour("ink") },
    margin: { l: 60, r: 15, t: 10, b: 50 }, hovermode: "closest",
    legend: { orientation: "h", y: -0.22, yanchor: "top" },
    hoverlabel: { font: { family: "system-ui, sans-serif" } },
    ...extra, xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

function plot(id, traces, shape) {
  if ($(id)) Plotly.react(id, traces, shape, { responsive: true, displaylogo: false, displayModeBar: false });
}

function drawFrontier() {
  if (!$("plot-frontier")) return;
  const split = $("split").value, floor = data.floors[split];
  const [unit, scale] = data.originalBytes >= 10 * 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  const hover = "%{text}<br>KL %{y:.4g} nats per token<br>%{x:,.1f} " + unit + "<extra></extra>";
  const text = (item) => `${plain(item.name)}, ${item.bits.toFixed(2)} bits`;
  const trace = (items, name, more) => ({
    x: items.map((item) => item.bytes / scale), y: items.map((item) => item.kl[split][0]), text: items.map(text),
    name, hovertemplate: hover, mode: "markers", type: "scatter", ...more,
  });
  const schemes = data.schemes.filter((scheme) => scheme.kl[split]);
  const kinds = [...new Set(data.arms.map((arm) => arm.kind))];
  const traces = kinds.map((kind, index) => trace(
    data.arms.filter((arm) => arm.kind === kind && arm.kl[split]), kind,
    { marker: { symbol: MARKS[index % MARKS.length], size: 8, color: colour(TONES[index % TONES.length]) } },
  ));
  traces.push(trace(schemes, "schemes", {
    mode: "lines+markers", line: { color: colour("accent"), width: 1.5, dash: "dot" },
    marker: { size: 11, color: colour("accent") },
    error_y: { type: "data", array: schemes.map((scheme) => 2 * (scheme.kl[split][1] ?? 0)), color: colour("accent") },
  }));
  const shapes = floor ? [{
    type: "line", xref: "paper", x0: 0, x1: 1, y0: floor, y1: floor, line: { color: colour("soft"), dash: "dot", width: 1 },
  }] : [];
  const notes = floor ? [{
    xref: "paper", x: 1, y: $("scale").value === "log" ? Math.log10(floor) : floor, text: "noise floor (BF16)",
    showarrow: false, xanchor: "right", yanchor: "bottom", font: { color: colour("soft"), size: 12 },
  }] : [];
  plot("plot-frontier", traces, layout(430, {
    shapes, annotations: notes,
    xaxis: { title: { text: `searched weights, ${unit}` } },
    yaxis: { title: { text: "held-out KL, nats per token" }, type: $("scale").value, exponentformat: "power" },
  }));
}

function drawHeat() {
  const scheme = $("heat-scheme").value, value = $("heat-value").value, format = $("heat-format").value;
  const kinds = [...new Set(data.groups.map((group) => group.kind))];
  const layers = [...new Set(data.groups.map((group) => group.layer ?? "–"))];
  const at = new Map(data.groups.map((group) => [`${group.kind}|${group.layer ?? "–"}`, group]));
  const cells = kinds.map((kind) => layers.map((layer) => at.get(`${kind}|${layer}`)));
  const number = (group) => (group?.scores[format] ?? {})[value] ?? null;
  const shown = (x) => (x === null ? null : value === "rank" ? x : x > 0 ? Math.log10(x) : null);
  const marks = data.groups.filter((group) => quantised(group, scheme));
  const often = (group) => (byName[scheme].flips[group.name] ?? 0) >= FLIPS_OFTEN;
  plot("plot-heat", [
    {
      type: "heatmap", x: layers, y: kinds.map(plain), z: cells.map((row) => row.map((group) => shown(number(group)))),
      colorscale: "Cividis", xgap: 1, ygap: 1, hoverongaps: false,
      text: cells.map((row) => row.map((group) => (group ? `${plain(group.name)}<br>${number(group)?.toPrecision(4) ?? "–"}<br>${group.formats[scheme].toUpperCase()} in ${plain(scheme)}` : ""))),
      hovertemplate: "%{text}<extra></extra>",
      colorbar: { title: { text: value === "rank" ? "rank" : "log₁₀" }, thickness: 12, len: 1 },
    },
    {
      type: "scatter", mode: "markers", x: marks.map((group) => group.layer ?? "–"), y: marks.map((group) => plain(group.kind)),
      hoverinfo: "skip", showlegend: false,
      marker: {
        symbol: marks.map((group) => (often(group) ? "circle-open" : "circle")), size: layers.length > 48 ? 4 : 7,
        color: "#ffffff", line: { color: "#000000", width: 1 },
      },
    },
  ], layout(90 + 46 * kinds.length, {
    xaxis: { title: { text: "layer" }, type: "category", showgrid: false, nticks: 20 },
    yaxis: { type: "category", autorange: "reversed", showgrid: false },
  }));
}

function drawStrips() {
  const names = data.schemes.map((scheme) => scheme.name), formats = ["bf16", ...data.formats];
  const tones = [colour("band"), colour("accent"), colour("second")].slice(0, formats.length);
  const steps = tones.flatMap((tone, index) => [[index / tones.length, tone], [(index + 1) / tones.length, tone]]);
  plot("plot-strips", [{
    type: "heatmap", x: data.groups.map((_, index) => index), y: names.map(plain),
    z: names.map((name) => data.groups.map((group) => formats.indexOf(group.formats[name]))),
    zmin: -0.5, zmax: formats.length - 0.5, colorscale: steps, showscale: false, ygap: 3,
    text: names.map((name) => data.groups.map((group) => `${plain(group.name)}<br>${group.formats[name].toUpperCase()} in ${plain(name)}`)),
    hovertemplate: "%{text}<extra></extra>",
  }], layout(80 + 24 * names.length, {
    xaxis: { title: { text: "quant group, in network order" }, showgrid: false },
    yaxis: { type: "category", autorange: "reversed", showgrid: false },
  }));
}

function drawDifference() {
  const [first, second] = [$("first").value, $("second").value];
  const differing = data.groups.filter((group) => group.formats[first] !== group.formats[second]);
  const gained = differing.filter((group) => !quantised(group, first)).length;
  $("difference-words").textContent = differing.length
    ? `${differing.length} of ${data.groups.length} groups differ: ${second} quantises ${gained} that ${first} leaves, and leaves ${differing.filter((group) => !quantised(group, second)).length} that it quantises.`
    : "No group differs.";
  const body = $("difference-table").tBodies[0];
  body.replaceChildren(...differing.map((group) => {
    const row = document.createElement("tr");
    const score = Object.values(group.scores)[0] ?? {};
    const cells = [group.name, group.formats[first].toUpperCase(), group.formats[second].toUpperCase(), score.score?.toExponential(2) ?? "–", score.rank ?? "–"];
    cells.forEach((text, index) => {
      const cell = row.insertCell();
      cell.textContent = text;
      if (index > 2) cell.className = "n";
    });
    return row;
  }));
}

function drawPredicted() {
  const points = data.points.filter((point) => point.predicted !== null);
  if (!$("plot-predicted") || !points.length) return;
  const values = points.flatMap((point) => [point.measured, point.predicted]).filter((x) => x > 0);
  const ends = [Math.min(...values) * 0.8, Math.max(...values) * 1.25];
  const trace = (items, name, tone, symbol) => ({
    type: "scatter", mode: "markers", name, x: items.map((p) => p.predicted), y: items.map((p) => p.measured),
    text: items.map((p) => plain(p.name)), marker: { size: 9, color: colour(tone), symbol },
    error_x: {
      type: "data", symmetric: false, array: items.map((p) => p.high - p.predicted),
      arrayminus: items.map((p) => p.predicted - p.low), color: colour(tone), thickness: 1,
    },
    hovertemplate: "%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>",
  });
  plot("plot-predicted", [
    { type: "scatter", mode: "lines", x: ends, y: ends, name: "equal", hoverinfo: "skip", line: { color: colour("soft"), dash: "dot", width: 1 } },
    trace(points.filter((p) => p.is_control), "control arms", "second", "x"),
    trace(points.filter((p) => !p.is_control), "schemes", "accent", "circle"),
  ], layout(430, {
    xaxis: { type: "log", title: { text: "predicted KL, nats per token" }, exponentformat: "power" },
    yaxis: { type: "log", title: { text: "measured KL, nats per token" }, exponentformat: "power" },
  }));
}

function filterGroups() {
  const wanted = $("filter").value.toLowerCase(), kind = $("kind").value;
  const rows = [...$("group-table").tBodies[0].rows];
  for (const row of rows) {
    const name = row.cells[0].textContent;
    row.hidden = !(row.textContent.toLowerCase().includes(wanted) && (!kind || name.endsWith(kind)));
  }
  $("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

function sortable(table) {
  const rows = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const text = row.cells[column].textContent;
        const number = head.className === "n" ? Number.parseFloat(text.replaceAll(",", "")) : Number.NaN;
        return Number.isNaN(number) ? text : number;
      };
      const sign = down ? -1 : 1;
      const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
      table.tBodies[0].append(...rows.toSorted((a, b) => sign * compare(value(a), value(b))));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

function drawAll() {
  drawFrontier(); drawHeat(); drawStrips(); drawPredicted();
}

function useTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  drawAll();
}

const names = data.schemes.map((scheme) => scheme.name);
fill("split", data.splits);
fill("heat-scheme", names, names[Math.floor((names.length - 1) / 2)]);
fill("heat-format", data.formats);
fill("first", names, names[0]);
fill("second", names, names[names.length - 1]);
for (const id of ["split", "scale"]) $(id)?.addEventListener("change", drawFrontier);
for (const id of ["heat-scheme", "heat-value", "heat-format"]) $(id).addEventListener("change", drawHeat);
for (const id of ["first", "second"]) $(id).addEventListener("change", drawDifference);
$("filter").addEventListener("input", filterGroups);
$("kind").addEventListener("change", filterGroups);
sortable($("group-table"));
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", (event) => useTheme(event.matches));
$("theme").addEventListener("click", () => useTheme(root.dataset.theme !== "dark"));
drawDifference();
filterGroups();
useTheme(prefersDark.matches);
