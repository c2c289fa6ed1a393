"use strict";
// What the reader can do: choose, filter, sort, copy, plan.
const quantised = (group, scheme) => group.formats[scheme] !== "bf16";

function fill(id, values, chosen) {
  for (const [value, text] of values) $(id)?.add(new Option(text, value, false, value === chosen));
}

function drawDifference() {
  const [first, second] = [$("first").value, $("second").value];
  const differing = data.groups.filter((group) => group.formats[first] !== group.formats[second]);
  const gained = differing.filter((group) => !quantised(group, first)).length;
  const lost = differing.filter((group) => !quantised(group, second)).length;
  const other = differing.length - gained - lost;
  $("difference-words").textContent = differing.length
    ? `${differing.length} of ${data.groups.length} groups differ: ${second} quantises ${gained} that ${first} leaves, leaves ${lost} that it quantises, and has ${other} in another format.`
    : "No group differs.";
  $("difference-table").tBodies[0].replaceChildren(...differing.map((group) => {
    const row = document.createElement("tr"), score = Object.values(group.scores)[0] ?? {};
    const cells = [group.name, group.formats[first].toUpperCase(), group.formats[second].toUpperCase(), score.score?.toExponential(2) ?? "–", score.rank ?? "–"];
    cells.forEach((text, index) => {
      const cell = row.insertCell();
      cell.textContent = text;
      if (index > 2) cell.className = "n";
    });
    return row;
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
    const button = html("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
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
    });
  });
}

// The plan at the slider's point of the exact frontier, beside the scheme that is nearest in bits.
function drawPlan() {
  if (!$("slider")) return;
  const curve = data.curves[Number($("plan-formats").value)], slider = $("slider");
  slider.max = curve.points.length - 1;
  const point = curve.points[Math.min(Number(slider.value), curve.points.length - 1)];
  const formats = data.groups.map((group, index) => data.letters[point.formats[index]]);
  const kl = point.kl === null ? null : short(point.kl * 1000), range = point.low === null ? "" : `${Math.round(data.level * 100)}% interval ${short(point.low * 1000)} to ${short(point.high * 1000)}`;
  const speed = data.phases.map(([phase, words]) => [words, point[`${phase}_ratio`] ?? null]).filter(([, ratio]) => ratio !== null).map(([words, ratio]) => [ratio.toFixed(2), words]);
  slider.setAttribute("aria-valuetext", [`${point.effective_bits.toFixed(2)} effective bits`, ...speed.map(([ratio, words]) => `${ratio}× at ${words}`)].join(", "));
  $("plan-less").textContent = curve.along === "bits" ? "Fewer bits" : "Slower";
  $("plan-more").textContent = curve.along === "bits" ? "more bits" : "faster";
  if ($("plan-speed")) {
    $("plan-speed").textContent = speed.length ? `${speed.map(([ratio]) => ratio).join(" / ")}×` : "–";
    $("plan-speed-of").textContent = speed.length ? `${speed.map(([, words]) => words).join(" / ")}, of 16 bits on ${data.speedDevice}` : "the profile has no times of its formats";
  }
  $("plan-bits").textContent = point.effective_bits.toFixed(2);
  $("plan-size").textContent = size(point.fileBytes ?? point.weight_bytes);
  $("plan-kl").textContent = kl ?? short(point.predicted_score * data.scoreScale);
  $("plan-interval").textContent = kl === null ? data.scoreUnit : ["10⁻³ nats a token", point.word, range].filter(Boolean).join("; ");
  const nearest = [...data.schemes].sort((one, other) => Math.abs(one.bits - point.effective_bits) - Math.abs(other.bits - point.effective_bits))[0];
  const differing = data.groups.filter((group, index) => group.formats[nearest.name] !== formats[index]).length;
  const measured = nearest.kl[data.splits[0]];
  $("plan-near").textContent = `${differing ? `${differing} of ${data.groups.length} groups differ from` : "The same as"} ${nearest.name}, ${nearest.bits.toFixed(2)} bits${measured ? `, measured KL ${short(measured[0] * 1000)}` : ""}.`;
  $("plan-recipe").textContent = point.recipe;
  $("plan-recipe").dataset.formats = point.formats;
  const counts = data.formats.map((format) => [format, formats.filter((one) => one === format).length]).filter(([, count]) => count);
  $("plan-mix").textContent = counts.map(([format, count]) => `${count} ${format.toUpperCase()}`).join(", ");
  layerPicture($("plan-layers"), (group, index) => formats[index], { reference: $("reference").value, said: `Formats of the groups at ${point.effective_bits.toFixed(2)} effective bits: ${$("plan-mix").textContent}.` });
}

function choosePlanCurve() {
  const curve = data.curves[Number($("plan-formats").value)], start = byName.get(data.take) ?? data.schemes[Math.floor(data.schemes.length / 2)];
  const near = curve.points.map((point) => Math.abs(point.effective_bits - start.bits));
  $("slider").max = curve.points.length - 1;
  $("slider").value = near.indexOf(Math.min(...near));
  drawPlan();
}

const remembered = {
  get theme() { try { return localStorage.getItem("bitladder-theme"); } catch { return null; } },
  set theme(value) { try { localStorage.setItem("bitladder-theme", value); } catch { /* a page that may store nothing */ } },
};

function drawAll() {
  drawFrontier(); drawWorth(); drawLayers(); drawPredicted(); drawPlan();
}

function useTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
  drawAll();
}

const names = data.schemes.map((scheme) => [scheme.name, scheme.name]);
const speeds = [...new Set(data.schemes.flatMap((scheme) => Object.keys(scheme.speed)))];
fill("split", data.splits.map((split) => [split, split]));
fill("across", [["bits", "effective bits"], ["bytes", "MiB of searched weights"], ...speeds.map((what) => [what, `speed: ${what}`])]);
fill("reference", data.formats.slice(1).map((format) => [format, format.toUpperCase()]));
fill("first", names, names[0][0]);
fill("second", names, names.at(-1)[0]);
fill("plan-formats", data.curves.map((curve, index) => [String(index), curve.title]));
for (const id of ["split", "scale", "across"]) $(id)?.addEventListener("change", drawFrontier);
$("reference").addEventListener("change", () => { drawLayers(); drawPlan(); });
for (const id of ["first", "second"]) $(id).addEventListener("change", drawDifference);
$("plan-formats")?.addEventListener("change", choosePlanCurve);
$("slider")?.addEventListener("input", drawPlan);
$("filter").addEventListener("input", filterGroups);
$("kind").addEventListener("change", filterGroups);
$("more-layers")?.addEventListener("click", (event) => {
  for (const hidden of document.querySelectorAll("#pictures [hidden]")) hidden.hidden = false;
  event.currentTarget.remove();
  drawLayers();
});
for (const button of document.querySelectorAll("[data-png]")) button.addEventListener("click", () => savePicture(button.dataset.png));
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copyText(button));
addEventListener("keydown", (event) => { if (event.key === "Escape") $("tip").hidden = true; });
sortable($("group-table"));
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", (event) => { if (!remembered.theme) useTheme(event.matches); });
$("theme").addEventListener("click", () => {
  const dark = root.dataset.theme !== "dark";
  remembered.theme = dark ? "dark" : "light";
  useTheme(dark);
});
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(drawAll);
});
addEventListener("beforeprint", () => {
  root.dataset.shown = root.dataset.theme;
  useTheme(false);
});
addEventListener("afterprint", () => useTheme(root.dataset.shown === "dark"));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("section[id]")) seen.observe(section);
drawDifference();
filterGroups();
useTheme(remembered.theme ? remembered.theme === "dark" : prefersDark.matches);
if ($("slider")) choosePlanCurve();
