/* Keeps the list of counters and the figures up to date. The page works without this script too. */

import { Rates, draw, inWords, scaleFor } from "./chart.js";
import "./copy.js";
import { ask, find, keepAsking, setText } from "./live.js";

const WINDOW = 5; // seconds in the means of the figures
const TYPING = 250; // milliseconds after a key, before a search

const table = find("#counters");
const edit = find("#edit");
const rows = new Map(); // by name: the row's element, its value, and the rates of its chart

// The rows

for (const element of table.tBodies[0].rows) rows.set(find("th bdi", element).textContent, newRow(element));

function newRow(element) {
  const name = find("th bdi", element).textContent;
  element.lastElementChild.before(find("#chart").content.cloneNode(true));
  find(".chart", element).setAttribute("aria-label", `Rate of ${name}`);
  if (edit) {
    const button = find("#edit-button").content.firstElementChild.cloneNode(true);
    find("bdi", button).textContent = name;
    element.lastElementChild.append(button);
  }
  return { element, value: find("[data-value]", element).textContent, rates: new Rates() };
}

function makeRow(name) {
  const element = find("#row").content.firstElementChild.cloneNode(true);
  element.id = `row-${encodeURIComponent(name)}`;
  for (const place of element.querySelectorAll("bdi")) place.textContent = name;
  find("button", element).value = name;
  find("button", element).setAttribute("aria-label", `Add one to ${name}`);
  find("th a", element).href = pageOf(name);
  return newRow(element);
}

/** Return the page of a counter, which leads back to this place in the list. */
function pageOf(name) {
  const query = new URLSearchParams(location.search);
  query.set("name", name);
  return `${table.dataset.detail}?${query}`;
}

/** Show rows for these counters, in this order. A row that stays is not touched: it may have the focus. */
function showCounters({ counters, next, ways }) {
  const names = new Set(counters.map((counter) => counter.name));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.element.remove();
    rows.delete(name);
  }
  let place = table.tBodies[0].firstElementChild;
  for (const { name, value } of counters) {
    let row = rows.get(name);
    if (row) {
      place = row.element.nextElementSibling;
    } else {
      row = makeRow(name);
      table.tBodies[0].insertBefore(row.element, place);
      rows.set(name, row);
    }
    row.value = value;
    setText(find("[data-value]", row.element), value);
  }
  const query = new URLSearchParams(location.search);
  table.hidden = counters.length === 0;
  find("#scale").hidden = table.hidden;
  find("#none").hidden = !table.hidden;
  find("#nothing").hidden = query.get("q") || query.get("after");
  find("#no-match").hidden = !find("#nothing").hidden;
  for (const [way, line] of Object.entries(ways ?? {})) {
    const code = find(`[data-way=${way}] code`);
    if (code) setText(code, line);
  }
  find("#first").hidden = !query.get("after");
  find("#all").hidden = !query.get("q") || table.hidden;
  find("#next").hidden = next === null;
  if (next !== null) {
    query.set("after", next);
    find("#next").href = `${location.pathname}?${query}`;
  }
  if (edit?.open) setText(find("#edit-value"), rows.get(edit.dataset.name)?.value ?? "gone: it was deleted");
}

/** Draw all charts on one scale, and say which. */
function chart() {
  for (const { value, rates } of rows.values()) rates.add(value);
  const scale = scaleFor([...rows.values()].map((row) => row.rates));
  for (const { element, rates } of rows.values()) {
    draw(find(".chart", element), rates, scale);
    setText(find("[data-rate]", element), rates.words);
  }
  const [lowest, highest] = [scale.lowest, scale.highest].map(inWords);
  setText(find("#scale"), `Charts: the last 60 seconds, each from ${lowest} to ${highest} per second.`);
}

// Search while typing

let typing = null;

find("#q").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, TYPING);
});

function search() {
  const query = new URLSearchParams(location.search);
  query.delete("after"); // the search begins with the first page
  const text = find("#q").value;
  if (text) query.set("q", text);
  else query.delete("q");
  history.replaceState(null, "", query.size ? `${location.pathname}?${query}` : location.pathname);
  for (const [name, { element }] of rows) find("th a", element).href = pageOf(name);
  ask();
}

// The dialog of one counter

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-edit]");
  if (button) {
    const name = find("th bdi", button.closest("tr")).textContent;
    edit.dataset.name = name;
    for (const place of edit.querySelectorAll("[data-name=text]")) place.textContent = name;
    for (const place of edit.querySelectorAll("[data-name=value]")) place.value = name;
    setText(find("#edit-value"), rows.get(name).value);
    setText(find("[role=alert]", edit), "");
    find("#new-value").value = "";
    askWhetherSure(false);
    edit.returnValue = "";
    edit.showModal();
    find("#new-value").focus();
  } else if (target.closest("[data-sure]")) {
    askWhetherSure(true);
    find("[data-keep]").focus();
  } else if (target.closest("[data-keep]")) {
    askWhetherSure(false);
    find("[data-sure]").focus();
  }
});

function askWhetherSure(isAsking) {
  edit.firstElementChild.hidden = isAsking;
  find("#sure").hidden = !isAsking;
  edit.setAttribute("aria-labelledby", isAsking ? "question" : "edit-title");
}

edit?.addEventListener("close", () => {
  // After a deletion, the row goes, with the button that had the focus.
  if (edit.returnValue === "done" && !find("#sure").hidden) find("#said").focus();
});

// The manager and the processes

const totals = []; // the manager's last totals, each with its time

/** Show rates of the last seconds. Without any event in them, the previous mean stays. */
function showMeans(time, now) {
  if (totals.length && (totals[0].epoch !== now.epoch || totals[0].pid !== now.pid)) totals.length = 0;
  totals.push({ ...now, time });
  if (totals.length > WINDOW + 1) totals.shift();
  if (totals.length < 2) return;
  const first = totals[0];
  const gained = (name) => now[name] - first[name];
  const say = (mean, total, number, unit) => {
    if (number > 0) setText(find(`[data-mean=${mean}]`), `${(total / number).toFixed(2)} ${unit}`);
  };
  for (const name of ["operations", "batches"]) {
    const rate = gained(name) / ((time - first.time) / 1000);
    const text = rate.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
    setText(find(`[data-mean=${name}]`), `${text}/s`);
  }
  say("batch", gained("operations"), gained("batches"), "operations");
  say("commit", gained("commit_seconds") * 1000, gained("commits"), "ms");
  setText(find("#basis"), "Rates and means, above too, are of the last seconds with traffic.");
}

function showProcesses(processes) {
  const model = find("#processes tbody tr");
  find("#processes").tBodies[0].replaceChildren(
    ...processes.map((process) => {
      const row = model.cloneNode(true);
      ["name", "pid", "uptime", "restarts"].forEach((key, index) => (row.cells[index].textContent = process[key]));
      return row;
    }),
  );
}

// The tables of shared objects, of their entries, and of connected processes

const calls = new Map(); // by object: the rates of its calls
let callsOf = null; // the manager that counted them

function showTables(tables) {
  find("#entries-card").hidden = tables.entries.length === 0;
  for (const [id, rows] of Object.entries(tables)) {
    find(`#${id}-part`).hidden = rows.length === 0;
    const none = find(`#no-${id}`);
    if (none) none.hidden = rows.length > 0;
    setText(find(`[data-count=${id}]`), `${rows.length}`);
    const body = find(`#${id}`).tBodies[0];
    while (body.rows.length > rows.length) body.lastElementChild.remove();
    while (body.rows.length < rows.length) {
      body.append(find(`#${id}-row`).content.firstElementChild.cloneNode(true));
    }
    rows.forEach((row, index) => {
      for (const cell of body.rows[index].querySelectorAll("[data-cell]")) setText(cell, row[cell.dataset.cell]);
    });
  }
}

/** Show the calls per second of each object, over the last seconds. */
function showCalls(rows, pid) {
  if (pid !== callsOf) calls.clear();
  callsOf = pid;
  rows.forEach((row, index) => {
    if (!calls.has(row.name)) calls.set(row.name, new Rates());
    calls.get(row.name).add(row.calls.replaceAll(",", ""));
    setText(find("[data-rate]", find("#objects").tBodies[0].rows[index]), calls.get(row.name).words);
  });
}

function show(found) {
  showCounters(found);
  for (const place of document.querySelectorAll("[data-figure]")) {
    setText(place, found.manager.now[place.dataset.figure]);
  }
  if (found.processes) showProcesses(found.processes);
  if (found.tables) showTables(found.tables);
}

function tick(found) {
  chart();
  if (found.manager) showMeans(performance.now(), found.manager.totals);
  if (found.tables) showCalls(found.tables.objects, found.manager.totals.pid);
}

find("#counters thead .rate").hidden = false;
for (const each of document.querySelectorAll("table")) each.classList.add("live");
keepAsking({ address: () => `${table.dataset.live}${location.search}`, show, tick });
