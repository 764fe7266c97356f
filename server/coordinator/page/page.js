// The picture of a view, and the line over which views come.

import { chart } from "./charts.js";
import { ABSENT, day, h, length, number, patch, size, tick, time } from "./words.js";

const SILENCE_MS = 40_000; // a server says something every 15 s
const AGAIN_MS = 3_000;
const UNSEEN_MS = 60_000;

let view = null, ahead = 0, lost = null, source = null, heard = Date.now();
const now = () => Date.now() / 1000 + ahead;
const at = (id) => document.getElementById(id);

// -- parts ------------------------------------------------------------------------------------

const chip = (word) => h("span", { class: `chip c-${word.replaceAll(" ", "-")}` }, word);

function fact(name, ...value) {
  return h("div", { class: "fact" }, h("dt", null, name), h("dd", null, value));
}

const wide = (name, ...value) =>
  h("div", { class: "fact all" }, h("dt", null, name), h("dd", null, value));

// columns: [name, (row) => content, class]; on a narrow screen rows become cards, with names.
// A column of nothing but absent values is left out.
function table(key, caption, all, rows, kind = "stack") {
  const columns = all.filter(([, of]) => rows.some((row) => of(row) !== ABSENT));
  const head = columns.map(([name, , css]) => h("th", { scope: "col", class: css }, name));
  const body = rows.map((row, index) =>
    h("tr", { "data-key": row.key ?? index },
      columns.map(([name, of, css], column) => {
        const said = of(row), classes = said === ABSENT ? `${css ?? ""} absent` : css;
        return h(column ? "td" : "th", { scope: column ? null : "row", "data-name": name,
          class: classes }, h("span", null, said));
      })));
  return h("div", { class: "scroll", "data-key": key, tabindex: 0, role: "group",
    "aria-label": caption },
  h("table", { class: kind }, h("caption", null, caption),
    h("thead", null, h("tr", null, head)), h("tbody", null, body)));
}

function alertLine(alert) {
  const word = alert.level === "problem" ? "Problem" : "Notice";
  return h("p", { class: `alert ${alert.level}`,
    "data-key": `${alert.kind} ${alert.about} ${alert.text}` },
  h("strong", null, `${word}: ${alert.about}: `), alert.text,
  alert.since !== null && h("span", { class: "soft" }, ", since ", time(alert.since, "since")));
}

function waitBox(run) {
  const wait = run.wait;
  if (!wait)
    return h("p", { class: "wait none", "data-key": "wait" },
      run.state === "running" ? "Waits for nobody." : `Not running: ${run.doing}.`);
  return h("dl", { class: "wait", "data-key": "wait" },
    fact("Waits for", wait.who.length ? wait.who.join(", ") : "nobody in particular"),
    fact("Why", wait.why),
    fact("Since", time(wait.since, "since")),
    fact("Until", wait.until === null ? "somebody acts" : time(wait.until, "until")),
    wait.then && wide("Then", wait.then));
}

function spent(epsilon, ceiling) {
  if (epsilon === null) return ABSENT;
  const said = epsilon.toFixed(2) + (ceiling === null ? "" : ` of ${ceiling.toFixed(2)}`);
  if (ceiling === null) return said;
  return h("span", { class: "nowrap" }, said, " ",
    h("meter", { min: 0, max: ceiling, high: 0.95 * ceiling, value: Math.min(epsilon, ceiling),
      "aria-label": `ε ${said}` }));
}

function facts(run) {
  const last = run.history[0];
  const pairs = (metrics) =>
    Object.entries(metrics).map(([name, value]) => `${name} ${number(value)}`).join(", ");
  return h("dl", { class: "facts", "data-key": "facts" },
    last && Object.keys(last.coordinator).length > 0 && fact("Coordinator", pairs(last.coordinator)),
    last && Object.keys(last.client).length > 0 && fact("Sites' mean", pairs(last.client)),
    run.privacy !== "none" &&
      fact(run.privacy === "client" ? "ε of clients" : "ε, largest", spent(run.epsilon,
        run.epsilon_ceiling)),
    fact("Per round", run.seconds_per_round === null ? ABSENT : length(run.seconds_per_round)),
    run.state === "running" && fact("Over about", time(run.eta, "about")),
    run.ended !== null && fact("Ended", time(run.ended, "at")),
    run.bytes_up !== null && fact("Bytes up, down", `${size(run.bytes_up)}, ${size(run.bytes_down)}`),
    run.method && fact("Method", run.method),
    run.restarts > 0 && fact("Restarts", run.restarts));
}

function charts(run) {
  const by = Map.groupBy ? Map.groupBy(run.curves, (c) => c.metric) : grouped(run.curves);
  const drawn = [];
  for (const [metric, curves] of by) {
    const private_ = metric === "epsilon";
    const limit = private_ && run.epsilon_ceiling !== null ? run.epsilon_ceiling : undefined;
    drawn.push(chart(private_ ? "ε spent" : metric.replaceAll("_", " "), curves, run.rounds, limit));
  }
  return h("div", { class: "charts", "data-key": "charts" }, drawn);
}

function grouped(curves) {
  const found = new Map();
  for (const one of curves) found.set(one.metric, [...(found.get(one.metric) ?? []), one]);
  return found;
}

function asked(row) {
  if (!row.asked) return ABSENT;
  return `${row.asked}${row.round ? `, round ${row.round}` : ""}: ${row.state}`;
}

function counts(row) {
  const failed = row.failures ? `, ${row.failures} failed` : "";
  return `${row.rounds} counted${failed}${row.late ? `, ${row.late} late` : ""}`;
}

function runSites(run) {
  if (!run.sites.length) return null;
  const epsilon = run.privacy === "record"
    ? [["ε", (row) => spent(row.epsilon, run.epsilon_ceiling)]] : [];
  return table("sites", "Sites in this run", [
    ["site", (row) => row.site],
    ["asked", asked],
    ["since", (row) => time(row.since, "since")],
    ["until", (row) => time(row.until, "until")],
    ["rounds", counts],
    ["records", (row) => number(row.examples), "n"],
    ...epsilon,
    ["reason", (row) => row.reason || ABSENT, "said"],
  ], run.sites.map((row) => ({ key: row.site, ...row })));
}

function summed(row) {
  if (row.members === null) return ABSENT;
  const lost = Object.entries(row.lost).map(([stage, count]) => `${count} at ${stage}`).join(", ");
  return `${row.survivors} of ${row.members} members${lost ? `, lost ${lost}` : ""}`;
}

function rounds(run) {
  if (!run.history.length) return null;
  const names = (side) => [...new Set(run.history.flatMap((row) => Object.keys(row[side])))].sort();
  const metrics = [["coordinator", "coordinator"], ["client", "sites"]].flatMap(([side, said]) =>
    names(side).map((name) =>
      [`${name}, ${said}`, (row) => number(row[side][name]), "n"]));
  const open = run.privacy !== "client";
  return h("details", { class: "rounds", "data-key": "rounds" },
    h("summary", null, `Rounds (${run.history.length === run.round ? "all" : "the last"} `
      + `${run.history.length})`),
    table("rounds", "Rounds, the newest first", [
      ["round", (row) => row.round, "n"],
      ["ended", (row) => time(row.ended, "at")],
      ...(open ? [["deltas", (row) => `${row.trained} of ${row.asked}`, "n"]] : []),
      ...(open && run.history.some((row) => row.members !== null)
        ? [["secure sum", summed, "said"]] : []),
      ...metrics,
      ...(open ? [
        ["training loss", (row) => number(row.loss), "n"],
        ["up", (row) => row.bytes_up === null ? ABSENT : size(row.bytes_up), "n"],
        ["down", (row) => row.bytes_down === null ? ABSENT : size(row.bytes_down), "n"],
        ["seconds", (row) => number(row.seconds), "n"],
      ] : []),
    ], run.history.map((row) => ({ key: row.round, ...row })), "wide"));
}

function runBody(run) {
  const progress = run.rounds !== null && h("progress", { max: run.rounds, value: run.round,
    "data-key": "progress", "aria-label": `${run.round} of ${run.rounds} rounds` });
  return [
    h("p", { class: "doing", "data-key": "doing" }, run.doing), progress,
    run.detail && h("p", { class: "detail", "data-key": "detail" }, run.detail),
    !OVER.has(run.state) && waitBox(run), facts(run), charts(run), runSites(run), rounds(run)];
}

const OVER = new Set(["finished", "failed", "stopped"]);

function activeRun(run) {
  return h("article", { class: "run", "data-key": run.run },
    h("header", { "data-key": "head" }, h("h2", null, run.name), chip(run.state),
      h("code", null, run.run)), runBody(run));
}

function pastRun(run) {
  return h("details", { class: "run past", "data-key": run.run },
    h("summary", null, h("b", null, run.name), " ", chip(run.state), " ",
      h("span", { class: "soft" }, run.doing, ", begun ", time(run.created, "at"))),
    h("p", null, h("code", null, run.run)), runBody(run));
}

function sitesTable() {
  return table("sites", "Sites", [
    ["site", (row) => row.name],
    ["state", (row) => chip(row.state)],
    ["doing", (row) => [row.doing, row.run && h("span", { class: "soft" }, ` (${row.run})`)], "said"],
    ["since", (row) => time(row.since, "since")],
    ["why", (row) => row.reason || row.checks.join("; ") || ABSENT, "said"],
    ["last report", (row) => time(row.heard, "ago")],
    ["certificate ends", (row) => time(row.certificate_ends, "day")],
    ["version", (row) => row.version || ABSENT],
  ], view.sites.map((row) => ({ key: row.name, ...row })));
}

// -- the picture --------------------------------------------------------------------------------

function fill(id, ...children) {
  const old = at(id), fresh = old.cloneNode(false);
  for (const child of children.flat(9)) if (child) fresh.append(child);
  patch(old, fresh);
}

function draw() {
  const active = view.runs.filter((run) => !OVER.has(run.state));
  const past = view.runs.filter((run) => OVER.has(run.state));
  document.title = `${view.federation}: Anabranch`;
  at("federation").textContent = view.federation;
  at("where").textContent = view.viewer
    ? `${view.address}, as seen by ${view.viewer}` : view.address;
  fill("alerts", view.alerts.map(alertLine));
  fill("runs", active.map(activeRun), !active.length &&
    h("p", { class: "empty" }, "No run is under way."));
  fill("sites", h("h2", null, "Sites"), view.sites.length ? sitesTable()
    : h("p", { class: "empty" }, "No site has joined yet."),
  view.invitations.map((one) => h("p", { class: "soft" }, `${one.site} is invited; the invitation `
    + "ends ", time(one.expires, "until"))));
  fill("past", past.length > 0 && h("h2", null, "Runs that are over"), past.map(pastRun),
    view.older_runs > 0 && h("p", { class: "soft" }, `and ${view.older_runs} older ones`));
  const disk = view.disk_free === null ? "" : ` ${size(view.disk_free)} of disk are free.`;
  const ends = view.certificate_ends === null ? ""
    : ` The coordinator's certificate ends ${day(view.certificate_ends)}.`;
  at("foot").textContent = "This page is for reading; it changes nothing."
    + `${disk}${ends} Anabranch ${view.version}.`;
  document.body.dataset.ready = "yes";
  second();
}

function second() {
  const link = at("link");
  if (lost !== null) {
    link.className = "link gone";
    const said = `connection lost, since ${SINCE()}; trying again`;
    if (link.textContent !== said) link.textContent = said;
  } else if (view) {
    link.className = "link";
    if (link.textContent !== "live") link.textContent = "live";
  }
  tick(document, now());
}

const SINCE = () => new Date(lost).toLocaleTimeString([], { hour12: false });

// -- the line -----------------------------------------------------------------------------------

function fail(since) {
  lost ??= since;
  second();
}

function connect() {
  source?.close();
  heard = Date.now();
  source = new EventSource("/events");
  const live = (event) => {
    heard = Date.now();
    lost = null;
    return JSON.parse(event.data);
  };
  source.addEventListener("view", (event) => {
    view = live(event);
    ahead = view.at - Date.now() / 1000;
    draw();
  });
  source.addEventListener("still", (event) => {
    ahead = live(event).at - Date.now() / 1000;
    second();
  });
  source.addEventListener("trouble", (event) => {
    const { message } = live(event);
    fill("alerts", h("p", { class: "alert problem" }, h("strong", null, "Problem: coordinator: "),
      message), (view?.alerts ?? []).map(alertLine));
    second();
  });
  source.onerror = () => {
    fail(Date.now());
    if (source.readyState === EventSource.CLOSED && !document.hidden) setTimeout(connect, AGAIN_MS);
  };
}

// A tab that nobody looks at gives its line back after a while: a browser has six for a server.
let unseen = null;

document.addEventListener("visibilitychange", () => {
  clearTimeout(unseen);
  if (document.hidden) unseen = setTimeout(() => source.close(), UNSEEN_MS);
  else if (source.readyState === EventSource.CLOSED) connect();
});

setInterval(() => {
  if (document.hidden) return;
  if (Date.now() - heard > SILENCE_MS) {
    fail(heard);
    connect();
  }
  second();
}, 1000);
connect();
