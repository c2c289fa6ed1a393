"use strict";
// What every figure is made of: SVG elements, axes, a tip, and a file of the picture. No numbers are decided here.
const root = document.documentElement;
const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const FONT = "system-ui, sans-serif";

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const label = (text, x, y, more = {}) => svg("text", { x, y, "font-size": 12, fill: colour("ink"), "font-family": FONT, ...more }, text);

// A number with so many significant digits and no exponent.
function short(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(digits));
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(rounded))));
  return rounded.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

function size(bytes) {
  if (bytes >= 10 * 2 ** 30) return `${(bytes / 2 ** 30).toFixed(2)} GiB`;
  const mib = bytes / 2 ** 20;
  return `${mib >= 1000 ? Math.round(mib).toLocaleString("en") : mib.toFixed(1)} MiB`;
}

const nats = (kl) => `${short(kl * 1000)} × 10⁻³ nats a token`;

// A scale: from values to places, and its ticks. `log` has 1, 2 and 5 of every power of ten, or the powers alone.
function scale(log, low, high, from, to) {
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const place = (value) => from + (((log ? Math.log10(value) : value) - a) / (b - a || 1)) * (to - from);
  const ticks = [];
  if (log) {
    const steps = b - a > 3.2 ? [1] : b - a > 1.4 ? [1, 3] : [1, 2, 3, 5, 7];
    for (let power = Math.floor(a); power <= Math.ceil(b); power += 1)
      for (const step of steps) ticks.push(step * 10 ** power);
  } else {
    const room = Math.abs(to - from) / 70, raw = (b - a) / Math.max(1, room), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = power * ([1, 2, 5, 10].find((one) => one * power >= raw) ?? 10);
    for (let value = Math.ceil(a / step) * step; value <= b + step / 1e6; value += step) ticks.push(Number(value.toPrecision(12)));
  }
  return { place, ticks: ticks.filter((tick) => tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)), low, high };
}

// An empty figure with axes. `x` and `y`: {log, low, high, title, show}. Returns where to draw, and the two scales.
function axes(id, height, x, y, left = 62) {
  const frame = $(id), width = Math.max(280, frame.clientWidth);
  const inner = { left, right: width - 14, top: 12, bottom: height - 46 };
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": frame.dataset.label });
  const across = scale(x.log, x.low, x.high, inner.left, inner.right), up = scale(y.log, y.low, y.high, inner.bottom, inner.top);
  const line = { stroke: colour("line"), "stroke-width": 1 };
  for (const tick of up.ticks) {
    picture.append(svg("line", { x1: inner.left, x2: inner.right, y1: up.place(tick), y2: up.place(tick), ...line }));
    picture.append(label(y.show(tick), inner.left - 8, up.place(tick) + 4, { "text-anchor": "end", fill: colour("soft") }));
  }
  for (const tick of across.ticks) {
    picture.append(svg("line", { x1: across.place(tick), x2: across.place(tick), y1: inner.bottom, y2: inner.bottom + 5, ...line }));
    picture.append(label(x.show(tick), across.place(tick), inner.bottom + 19, { "text-anchor": "middle", fill: colour("soft") }));
  }
  picture.append(svg("line", { x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom, stroke: colour("soft") }));
  picture.append(label(x.title, (inner.left + inner.right) / 2, height - 8, { "text-anchor": "middle" }));
  if (y.title) picture.append(label(y.title, 0, 0, { "text-anchor": "middle", transform: `translate(13 ${(inner.top + inner.bottom) / 2}) rotate(-90)` }));
  frame.replaceChildren(picture);
  return { picture, inner, across, up, width };
}

// Something that tells more when the pointer or the keyboard is on it.
function telling(element, text, focusable = true) {
  if (focusable) {
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", text);
  }
  const show = () => {
    const tip = $("tip"), box = element.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(box.left + box.width / 2 + 10, innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
  };
  for (const event of ["pointerenter", "focus"]) element.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) element.addEventListener(event, () => { $("tip").hidden = true; });
  return element;
}

const SHAPES = {
  circle: (x, y, r) => svg("circle", { cx: x, cy: y, r }),
  cross: (x, y, r) => svg("path", { d: `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`, fill: "none" }),
  diamond: (x, y, r) => svg("path", { d: `M${x},${y - r}L${x + r},${y}L${x},${y + r}L${x - r},${y}Z` }),
  square: (x, y, r) => svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
  triangle: (x, y, r) => svg("path", { d: `M${x},${y - r}L${x + r},${y + r}L${x - r},${y + r}Z` }),
};

function mark(shape, x, y, radius, attributes) {
  const made = SHAPES[shape](x, y, radius);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Labels beside points, each moved up or down until it covers no other.
function labels(picture, inner, items) {
  const taken = [];
  for (const item of [...items].sort((one, other) => one.y - other.y)) {
    const text = item.text.length > 24 ? `${item.text.slice(0, 23)}…` : item.text, wide = text.length * 6.7 + 10;
    const left = item.x + 12 + wide > inner.right;
    const box = (y) => ({ x0: left ? item.x - 12 - wide : item.x + 12, x1: left ? item.x - 12 : item.x + 12 + wide, y0: y - 8, y1: y + 8 });
    const free = (y) => taken.every((other) => { const own = box(y); return own.x1 < other.x0 || own.x0 > other.x1 || own.y1 < other.y0 || own.y0 > other.y1; });
    let y = item.y;
    for (let step = 0; step < 40 && !(free(y) && y > inner.top && y < inner.bottom); step += 1) y = item.y + (step % 2 ? 1 : -1) * 9 * Math.ceil((step + 1) / 2);
    taken.push(box(y));
    const paper = { stroke: colour("paper"), "stroke-width": 4, "paint-order": "stroke", "stroke-linejoin": "round" };
    picture.append(label(text, left ? item.x - 12 : item.x + 12, y + 4, { "text-anchor": left ? "end" : "start", "font-weight": item.bold ? 700 : 500, "aria-hidden": "true", ...paper }));
  }
}

// Save a figure as a PNG of twice its size, on the page's own ground.
async function savePicture(id) {
  const picture = $(id).querySelector("svg").cloneNode(true), width = Number(picture.getAttribute("width")), height = Number(picture.getAttribute("height"));
  picture.prepend(svg("rect", { x: 0, y: 0, width, height, fill: colour("paper") }));
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(picture))}`;
  await image.decode();
  const canvas = html("canvas", { width: 2 * width, height: 2 * height });
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  html("a", { href: canvas.toDataURL("image/png"), download: `${id}.png` }).click();
}

// Copy the text of an element; a page from a file may have no clipboard: then the text is selected.
async function copyText(button) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(source);
    button.textContent = "selected";
  }
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}
