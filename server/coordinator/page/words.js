// Words, numbers and times as text; elements; and how a new picture is put into the old one.

export const ABSENT = "–";

export function length(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 119.5) return `${seconds.toFixed(0)} s`;
  let minutes = Math.round(seconds / 60);
  if (minutes < 120) return `${minutes} min`;
  let hours = Math.floor(minutes / 60);
  minutes -= 60 * hours;
  if (hours < 48) return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  hours -= 24 * days;
  return hours ? `${days} d ${hours} h` : `${days} d`;
}

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (bytes >= 999.5 && power < units.length - 1) {
    bytes /= 1000;
    power += 1;
  }
  const digits = power === 0 ? 0 : bytes < 9.995 ? 2 : bytes < 99.95 ? 1 : 0;
  return `${bytes.toFixed(digits)} ${units[power]}`;
}

export function number(value) {
  if (value === null || value === undefined) return ABSENT;
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(3);
}

const two = (n) => String(n).padStart(2, "0");

export function day(at) {
  const d = new Date(1000 * at);
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
}

export function clock(at, now) {
  const d = new Date(1000 * at);
  const time = `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
  return day(at) === day(now) ? time : `${day(at)} ${time}`;
}

// A <time> is written anew every second: `show` says how.
const SHOWN = {
  since: (at, now) => `${clock(at, now)} (${length(Math.max(0, now - at))})`,
  until: (at, now) =>
    `${clock(at, now)} (${at > now ? `in ${length(at - now)}` : "overdue"})`,
  about: (at, now) =>
    `${clock(at, now).slice(0, -3)} (${at > now ? `in ${length(at - now)}` : "overdue"})`,
  ago: (at, now) => `${length(Math.max(0, now - at))} ago`,
  at: clock,
  day,
};

export function time(at, show) {
  if (at === null || at === undefined) return ABSENT;
  const iso = new Date(1000 * at).toISOString();
  return h("time", { datetime: iso, "data-at": at, "data-show": show, title: iso });
}

export function tick(root, now) {
  for (const one of root.querySelectorAll("time[data-at]")) {
    const said = SHOWN[one.dataset.show](Number(one.dataset.at), now);
    if (one.textContent !== said) one.textContent = said;
  }
}

// Elements. All text is text: nothing that a site says is ever read as HTML.
const SVG = "http://www.w3.org/2000/svg";

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, String(value));
  }
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : plain(String(child)));
  }
  return element;
}

// Control characters and those that reorder text can make a name read as another.
const plain = (text) =>
  text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, "\ufffd");

export const h = (tag, attributes, ...children) =>
  made(document.createElement(tag), attributes, children);

export const s = (tag, attributes, ...children) =>
  made(document.createElementNS(SVG, tag), attributes, children);

// Make `old` look like `fresh` and keep what did not change: focus, scrolling, open details.
export function patch(old, fresh) {
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name) && !(name === "open" && old.tagName === "DETAILS"))
      old.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.hasAttribute("data-at")) return;
  const before = keyed(old);
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const key = child.dataset?.key;
    const match = key === undefined ? place : before.get(key);
    if (match && like(match, child)) {
      if (match !== place) old.insertBefore(match, place);
      else place = place.nextSibling;
      if (match.nodeType === Node.ELEMENT_NODE) patch(match, child);
      else if (match.data !== child.data) match.data = child.data;
    } else old.insertBefore(child, place);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

const keyed = (parent) =>
  new Map([...parent.children].filter((c) => c.dataset.key).map((c) => [c.dataset.key, c]));

const like = (a, b) =>
  a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.dataset?.key === b.dataset?.key;
