// Curves by round, as SVG: at most three lines each, told apart by dashes as well as by colour.

import { h, number, s } from "./words.js";

const W = 340, H = 170, LEFT = 44, RIGHT = 10, TOP = 10, BOTTOM = 24;

function step(range, most) {
  const raw = range / most, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((one) => one * power >= raw * 0.999999);
}

function ticks(low, high, most) {
  const gap = step(high - low, most), found = [];
  for (let k = Math.floor(low / gap + 1e-9); k <= Math.ceil(high / gap - 1e-9); k += 1)
    found.push(k * gap);
  return found;
}

function yAxis(values, limit) {
  let low = Math.min(...values), high = Math.max(...values, limit ?? -Infinity);
  const share = low >= 0 && high <= 1;
  if (limit !== undefined) low = 0;
  if (high - low < 1e-9) {
    const pad = Math.abs(high) * 0.1 || 0.1;
    low = low >= 0 ? Math.max(0, low - pad) : low - pad;
    high = share ? Math.min(1, high + pad) : high + pad;
    if (high - low < 1e-9) low -= 0.1;
  }
  return ticks(low, high, 4);
}

const short = (value) => String(Number(value.toPrecision(6)));

// series: [{ source, points: [[round, value], …] }]; rounds: planned; limit: a line not to cross
export function chart(title, series, rounds, limit) {
  const values = series.flatMap((one) => one.points.map(([, value]) => value));
  const last = Math.max(rounds ?? 0, 2, ...series.flatMap((o) => o.points.map(([n]) => n)));
  const marks = yAxis(values, limit), low = marks[0], high = marks.at(-1);
  const x = (n) => LEFT + ((n - 1) / (last - 1)) * (W - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (v - low) / (high - low)) * (H - TOP - BOTTOM);
  const drawn = [];
  for (const mark of marks) {
    drawn.push(s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(mark), y2: y(mark) }));
    drawn.push(s("text", { x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end" }, short(mark)));
  }
  const whole = ticks(1, last, 6).filter((n) => Number.isInteger(n) && n > 1 && n < last * 0.9);
  for (const n of [1, ...whole, last])
    drawn.push(s("text", { x: x(n), y: H - 6, "text-anchor": n === last ? "end" : "middle" },
      n === 1 ? "round 1" : n));
  if (limit !== undefined)
    drawn.push(s("line", { class: "limit", x1: LEFT, x2: W - RIGHT, y1: y(limit), y2: y(limit) }));
  series.forEach((one, index) => {
    const points = one.points.map(([n, v]) => `${x(n).toFixed(1)},${y(v).toFixed(1)}`);
    drawn.push(s("polyline", { class: `line k${index % 3}`, points: points.join(" ") }));
    const [n, v] = one.points.at(-1);
    drawn.push(s("circle", { class: `dot k${index % 3}`, cx: x(n), cy: y(v), r: 3.5 }));
  });
  const says = series.map((one) => {
    const [from, first] = one.points[0], [to, value] = one.points.at(-1);
    return `${one.source}: ${number(first)} in round ${from}, ${number(value)} in round ${to}`;
  });
  const label = `${title} by round. ${says.join("; ")}.`;
  return h("figure", { class: "chart", "data-key": title },
    h("figcaption", null, title),
    s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label }, drawn),
    h("ul", { class: "legend" },
      series.map((one, index) => h("li", null,
        s("svg", { class: "key", viewBox: "0 0 22 8", "aria-hidden": "true" },
          s("line", { class: `line k${index % 3}`, x1: 0, x2: 22, y1: 4, y2: 4 })),
        h("span", null, `${one.source} `), h("b", null, number(one.points.at(-1)[1])))),
      limit !== undefined && h("li", null,
        s("svg", { class: "key", viewBox: "0 0 22 8", "aria-hidden": "true" },
          s("line", { class: "limit", x1: 0, x2: 22, y1: 4, y2: 4 })),
        h("span", null, "planned "), h("b", null, number(limit)))));
}
