// Elements and numbers. Text from models and annotations only ever becomes a text node.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

/** An element with attributes (on...: listeners, style: CSS variables) and children (strings become text). */
function el(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) made.style.setProperty(key, one);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const known = (value) => value !== null && value !== undefined;

/** A number as people write it; an en dash where there is none. */
function number(value, digits = 2) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(size >= 100 ? value.toFixed(0) : value.toPrecision(digits + 1)));
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const seconds = (time, frame) => (known(time) ? `${Number(time.toFixed(2))} s` : `frame ${frame + 1}`);

/** Arrow keys, Home and End move the focus along a row of elements of which one is in the tab order. */
function roving(parent, items, { column = false } = {}) {
  const [back, on] = column ? ["ArrowUp", "ArrowDown"] : ["ArrowLeft", "ArrowRight"];
  items().forEach((item, i) => item.setAttribute("tabindex", i === 0 ? "0" : "-1"));
  parent.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(event.target);
    const to = { [back]: at - 1, [on]: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = all[clamp(to, 0, all.length - 1)];
    all[at].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}

// From the dark of the stage to the light of the lamp.
const RAMP = [
  [0, [30, 26, 20]],
  [30, [76, 47, 20]],
  [60, [172, 104, 28]],
  [85, [246, 183, 60]],
  [100, [255, 244, 214]],
];

/** The colour of a brightness from 0 to 100. */
function light(value) {
  if (!known(value)) return "transparent";
  let i = 1;
  while (i < RAMP.length - 1 && RAMP[i][0] < value) i += 1;
  const [[low, from], [high, to]] = [RAMP[i - 1], RAMP[i]];
  const part = clamp((value - low) / (high - low), 0, 1);
  return `rgb(${from.map((one, c) => Math.round(one + part * (to[c] - one))).join(" ")})`;
}

const LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/** Attention of a token to a frame, as a share of 1, from the 64 levels it is stored in. */
function attention(group, response, token, frame) {
  const level = LEVELS.indexOf((response.looks[token] || "")[frame]);
  return level < 0 ? 0 : (level / 63) ** 2 * (group.peak || 0);
}

/** The same from 0 to 1, above what tokens of this group usually give any frame. */
function glow(group, value) {
  const floor = group.floor || 0;
  return group.peak > floor ? clamp((value - floor) / (group.peak - floor), 0, 1) : 0;
}
