"use strict";
// The figures: damage against size, what the search is worth, layers, predicted against measured.
const data = JSON.parse($("data").textContent);
const byName = new Map(data.schemes.map((scheme) => [scheme.name, scheme]));
const toneOf = (format) => (format === "bf16" ? "kept" : `f${data.formats.indexOf(format)}`);
const KINDS = { random: "circle", inverse: "cross", first_last: "square", largest: "triangle", lowest_score: "diamond", modelopt: "diamond" };

function spread(values) {
  const positive = values.filter((value) => value > 0);
  return positive.length ? [Math.min(...positive), Math.max(...positive)] : [1e-4, 1];
}

const AXES = {
  bits: { title: "effective bits of the searched weights", of: (item) => item.bits ?? item.effective_bits, show: (tick) => String(tick) },
  bytes: { title: "searched weights, MiB", of: (item) => item.bytes / 2 ** 20, show: (tick) => tick.toLocaleString("en") },
};

function speedAxis(what) {
  const planned = `${data.predictedSpeeds[what]}_ratio`;
  return { title: `times the original's tokens per second: ${what}`, of: (item) => item.speed?.[what] ?? item[planned] ?? null, show: (tick) => `${tick}×` };
}

function drawFrontier() {
  if (!$("plot-frontier")) return;
  const split = $("split").value, choice = $("across").value, log = $("scale").value === "log", floor = data.floors[split];
  const axis = AXES[choice] ?? speedAxis(choice), along = AXES[choice] ? "bits" : data.predictedSpeeds[choice];
  const first = split === data.splits[0], usable = (item) => axis.of(item) !== null && item.kl[split];
  const schemes = data.schemes.filter(usable), arms = data.arms.filter(usable);
  const curves = first ? data.curves.filter((curve) => curve.along === along).map((curve) => ({ ...curve, points: curve.points.filter((point) => point.kl > 0) })).filter((curve) => curve.points.length > 1) : [];
  const measured = [...schemes, ...arms].map((item) => item.kl[split][0]);
  const seen = [...measured, ...(floor ? [floor] : [])];
  const [least, most] = spread(seen.length ? seen : curves.flatMap((curve) => curve.points.map((point) => point.kl)));
  const xs = [...schemes, ...arms, ...(curves[0]?.points ?? [])].map(axis.of), room = (Math.max(...xs) - Math.min(...xs)) * 0.05 || 1;
  const bound = data.nearlyLossless, reach = bound < most * 8 ? bound * 1.4 : 0; // far above all of it, the bound needs no room
  const [low, high] = log ? [least / 2, Math.max(most * 2, reach)] : [0, Math.max(most * 1.1, reach)];
  const { picture, inner, across, up } = axes("plot-frontier", 440,
    { low: Math.min(...xs) - room, high: Math.max(...xs) + room, title: axis.title, show: axis.show },
    { log, low, high, title: "held-out KL, 10⁻³ nats a token", show: (tick) => short(tick * 1000, 1) });
  const clip = svg("clipPath", { id: "inside" }, svg("rect", { x: inner.left, y: inner.top, width: inner.right - inner.left, height: inner.bottom - inner.top }));
  const drawing = svg("g", { "clip-path": "url(#inside)" });
  picture.append(svg("defs", {}, clip), drawing);
  const y = (value) => up.place(Math.max(value, low));
  const edge = Math.max(y(bound), inner.top);
  drawing.append(svg("rect", { x: inner.left, width: inner.right - inner.left, y: edge, height: Math.max(0, inner.bottom - edge), fill: colour("good"), opacity: 0.07, class: "lossless" }));
  picture.append(label(bound > high ? `all of this is nearly lossless: below ${short(bound * 1000)}` : "nearly lossless", inner.right - 6, edge + 15, { fill: colour("good"), "font-weight": 600, "text-anchor": "end" }));
  if (floor) {
    drawing.append(svg("line", { x1: inner.left, x2: inner.right, y1: y(floor), y2: y(floor), stroke: colour("soft"), "stroke-dasharray": "2 4" }));
    picture.append(label("noise floor of BF16 arithmetic", inner.left + 6, y(floor) - 5, { fill: colour("soft") }));
  }
  for (const [index, curve] of [...curves.entries()].reverse()) {
    const whole = index === 0, tone = colour(whole ? "whole" : toneOf(curve.formats[0]));
    const path = (of) => curve.points.map((point) => `${across.place(axis.of(point))},${y(of(point))}`);
    if (whole && curve.points[0].low !== null)
      drawing.append(svg("polygon", { points: [...path((p) => p.low), ...path((p) => p.high).reverse()].join(" "), fill: tone, opacity: 0.13, class: "band" }));
    drawing.append(svg("polyline", { points: path((p) => p.kl).join(" "), fill: "none", stroke: tone, "stroke-width": whole ? 2.4 : 1.4, "stroke-dasharray": whole ? "" : "5 4", class: "curve", "data-formats": curve.formats.join(" ") }));
  }
  for (const arm of arms)
    drawing.append(telling(mark("circle", across.place(axis.of(arm)), y(arm.kl[split][0]), 3.5, { fill: colour("arm"), opacity: 0.75, class: "arm" }),
      `${arm.name}: ${arm.kind}, ${arm.bits.toFixed(2)} bits, KL ${nats(arm.kl[split][0])}`, false));
  for (const scheme of schemes) {
    const [kl, error] = scheme.kl[split], x = across.place(axis.of(scheme)), chosen = scheme.name === data.take;
    if (error) drawing.append(svg("line", { x1: x, x2: x, y1: y(kl + 2 * error), y2: y(Math.max(kl - 2 * error, low)), stroke: colour("ink"), "stroke-width": 1.5 }));
    const said = `${scheme.name}: ${scheme.bits.toFixed(2)} bits, ${size(scheme.weightBytes)}, KL ${nats(kl)}${error ? `, two standard errors ${short(2000 * error, 1)}` : ""}`;
    picture.append(telling(mark("circle", x, y(kl), chosen ? 8 : 6, { fill: colour(chosen ? "good" : "ink"), stroke: colour("paper"), "stroke-width": 2, class: "scheme", "data-name": scheme.name, "data-kl": kl }), said));
  }
  labels(picture, inner, schemes.map((scheme) => ({ text: scheme.name, x: across.place(axis.of(scheme)), y: y(scheme.kl[split][0]), bold: scheme.name === data.take })));
  const key = [...curves.map((curve, index) => [index === 0 ? "whole" : toneOf(curve.formats[0]), index === 0 ? `predicted, ${curve.formats.map((f) => f.toUpperCase()).join(" + ")} and BF16${curve.points[0].low === null ? "" : `, ${Math.round(data.level * 100)}% interval`}` : `${curve.formats[0].toUpperCase()} and BF16 alone`]),
    ["ink", "schemes, measured"], ...(arms.length ? [["arm", "control arms: other choices at the same bits"]] : [])];
  $("key-frontier").replaceChildren(...key.map(([tone, text]) => html("li", {}, html("i", { style: `background:var(--${tone})` }), text)));
}

function drawWorth() {
  if (!$("plot-worth")) return;
  const rows = data.worth, width = Math.max(280, $("plot-worth").clientWidth), narrow = width < 600, left = narrow ? 14 : 190, row = narrow ? 52 : 38;
  const [least, most] = spread(rows.flatMap((entry) => [...(entry.kl === null ? [] : [entry.kl]), ...entry.kinds.flatMap((kind) => kind.kls)]));
  const { picture, inner, across } = axes("plot-worth", 70 + row * rows.length,
    { log: true, low: least / 1.3, high: most * 1.3, title: "held-out KL, 10⁻³ nats a token", show: (tick) => short(tick * 1000, 1) },
    { low: 0, high: 1, show: () => "" }, left);
  for (const node of [...picture.querySelectorAll("line")].slice(0, 2)) node.remove();
  rows.forEach((entry, index) => {
    const y = inner.top + row * (index + (narrow ? 0.75 : 0.5)), all = [...(entry.kl === null ? [] : [entry.kl]), ...entry.kinds.flatMap((kind) => kind.kls)];
    const name = entry.scheme.length > 24 ? `${entry.scheme.slice(0, 23)}…` : entry.scheme;
    picture.append(label(name, narrow ? left : left - 12, narrow ? y - 18 : y + 4, { "text-anchor": narrow ? "start" : "end", "font-weight": entry.scheme === data.take ? 700 : 500 }));
    picture.append(svg("line", { x1: across.place(Math.min(...all)), x2: across.place(Math.max(...all)), y1: y, y2: y, stroke: colour("line"), "stroke-width": 2 }));
    for (const kind of entry.kinds)
      for (const kl of kind.kls)
        picture.append(telling(mark(KINDS[kind.kind], across.place(kl), y, 5, { fill: colour("arm"), stroke: colour("paper"), ...(kind.kind === "inverse" ? { stroke: colour("arm"), "stroke-width": 2 } : {}), class: "arm" }), `${kind.title}, KL ${nats(kl)}`, false));
    if (entry.agrees) picture.append(label("= ModelOpt's choice", Math.min(across.place(entry.kl ?? least), inner.right - 120), y + 19, { "font-size": 11, fill: colour("soft") }));
    if (entry.kl !== null)
      picture.append(telling(mark("circle", across.place(entry.kl), y, 7, { fill: colour("good"), stroke: colour("paper"), "stroke-width": 2, class: "scheme", "data-kl": entry.kl }), `${entry.scheme}, KL ${nats(entry.kl)}; beside ${entry.kinds.map((kind) => `${kind.kls.length} of ${kind.title}`).join(", ")}`));
  });
  const kinds = new Map(rows.flatMap((entry) => entry.kinds.map((kind) => [kind.kind, kind.title])));
  const sign = (shape, tone) => svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, mark(shape, 7, 7, 5, { fill: `var(--${tone})`, ...(shape === "cross" ? { stroke: `var(--${tone})`, "stroke-width": 2 } : {}) }));
  $("key-worth").replaceChildren(html("li", {}, sign("circle", "good"), "the scheme"), ...[...kinds].map(([kind, title]) => html("li", {}, sign(KINDS[kind], "arm"), title)));
}

// Layers across, kinds of group down; a cell's colour is its format, its depth the sensitivity.
const kindsOfGroups = [...new Set(data.groups.map((group) => group.kind))];
const layersOfGroups = [...new Set(data.groups.map((group) => group.layer ?? "–"))];
const shownScore = (score) => `${short(score * data.scoreScale)} ${data.scoreUnit}`;
const shortKind = (kind) => kind.replace(/_proj$/, "").replace("_proj_", "_");

function layerPicture(frame, formatOf, options) {
  const width = Math.max(240, frame.clientWidth), reference = options.reference;
  const left = Math.min(110, 12 + 6.6 * Math.max(...kindsOfGroups.map((kind) => shortKind(kind).length))), top = 4, cell = Math.min(44, (width - left - 4) / layersOfGroups.length);
  const tall = Math.max(13, Math.min(24, cell)), height = top + tall * kindsOfGroups.length + 22, gap = cell > 8 ? 1.5 : 0.5;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": options.said });
  kindsOfGroups.forEach((kind, row) => picture.append(label(shortKind(kind), left - 6, top + tall * (row + 0.5) + 4, { "text-anchor": "end", "font-size": 11, fill: colour("soft") })));
  const every = [1, 2, 4, 5, 10, 20].find((step) => cell * step >= 22) ?? 40;
  layersOfGroups.forEach((layer, column) => {
    if (layer === "–" || layer % every === 0) picture.append(label(String(layer), left + cell * (column + 0.5), height - 6, { "text-anchor": "middle", "font-size": 11, fill: colour("soft") }));
  });
  const worst = options.worst ? data.worst[reference] : [];
  data.groups.forEach((group, index) => {
    const format = formatOf(group, index), found = group.scores[reference] ?? Object.values(group.scores)[0];
    const x = left + cell * layersOfGroups.indexOf(group.layer ?? "–"), y = top + tall * kindsOfGroups.indexOf(group.kind);
    const depth = 0.32 + 0.68 * (found?.shade ?? 0), box = svg("rect", {
      x: x + gap / 2, y: y + gap / 2, width: Math.max(1, cell - gap), height: tall - gap, rx: cell > 10 ? 2 : 0,
      fill: colour(toneOf(format)), "fill-opacity": depth.toFixed(3), class: "cell", "data-format": format, "data-group": group.name,
    });
    const open = (options.flips?.[group.name] ?? 0) >= data.flipsOften;
    if (open) for (const [key, value] of Object.entries({ stroke: colour("ink"), "stroke-dasharray": "2 2" })) box.setAttribute(key, value);
    picture.append(telling(box, `${group.name}: ${format.toUpperCase()}; sensitivity ${found ? shownScore(found.score) : "–"}, rank ${found?.rank ?? "–"}${open ? "; may change sides" : ""}`, false));
    const place = worst.indexOf(group.name);
    if (place >= 0) {
      const paper = { stroke: colour("paper"), "stroke-width": 3, "paint-order": "stroke" };
      picture.append(label(String(place + 1), x + cell / 2, y + tall / 2 + 4, { "text-anchor": "middle", "font-weight": 700, "font-size": 12, ...paper, class: "worst", "pointer-events": "none" }));
    }
  });
  frame.replaceChildren(picture);
}

function drawLayers() {
  const reference = $("reference").value;
  for (const scheme of data.schemes) {
    const frame = document.querySelector(`[data-layers="${CSS.escape(scheme.name)}"]`);
    if (!frame || frame.closest("[hidden]")) continue;
    layerPicture(frame, (group) => group.formats[scheme.name], { reference, worst: true, flips: scheme.flips, said: `Formats of the groups of ${scheme.name}, layers across, kinds of group down; the table of groups has the same.` });
  }
  const ends = data.scores[reference];
  $("ends").textContent = ends ? `Pale to deep: sensitivity in ${reference.toUpperCase()} from ${short(ends[0] * data.scoreScale)} to ${shownScore(ends[1])}, in logarithms.` : "";
  $("worst").replaceChildren(...data.worst[reference].map((name) => {
    const group = data.groups.find((one) => one.name === name);
    return html("li", {}, html("code", {}, name), ` ${shownScore(group.scores[reference].score)}`);
  }));
}

function drawPredicted() {
  const points = data.points.filter((point) => point.predicted !== null);
  if (!$("plot-predicted") || !points.length) return;
  const [least, most] = spread(points.flatMap((point) => [point.measured, point.predicted, point.low, point.high]));
  const range = { log: true, low: least / 1.2, high: most * 1.2, show: (tick) => short(tick * 1000, 1) };
  const { picture, across, up } = axes("plot-predicted", 420, { ...range, title: "predicted KL, 10⁻³ nats a token" }, { ...range, title: "measured KL, 10⁻³ nats a token" });
  picture.append(svg("line", { x1: across.place(range.low), y1: up.place(range.low), x2: across.place(range.high), y2: up.place(range.high), stroke: colour("soft"), "stroke-dasharray": "2 4" }));
  for (const point of [...points].sort((one, other) => other.is_control - one.is_control)) {
    const y = up.place(point.measured), tone = colour(point.is_control ? "arm" : "accent");
    picture.append(svg("line", { x1: across.place(point.low), x2: across.place(point.high), y1: y, y2: y, stroke: tone, opacity: point.is_control ? 0.5 : 1 }));
    picture.append(telling(mark("circle", across.place(point.predicted), y, point.is_control ? 3.5 : 6, { fill: tone, class: point.is_control ? "arm" : "scheme", "data-kl": point.measured }), `${point.name}: predicted ${short(point.predicted * 1000)}, measured ${nats(point.measured)}`, !point.is_control));
  }
}
