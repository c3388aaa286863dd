/* Keeps the dashboard up to date, and does what its forms do without leaving the page. All of it works without this. */

const PERIOD = 1000; // milliseconds from an answer to the next question
const LONGEST_PAUSE = 30000; // milliseconds, when there are no answers
const PATIENCE = 10000; // milliseconds that an answer may take
const POINTS = 60; // in a chart
const WINDOW = 5; // points that a rate in words is the mean of

const find = (selector, within = document) => within.querySelector(selector);
const table = find("#counters");
const sure = find("#sure");
const pauseButton = find("#pause");
const rows = new Map(); // by name: the row's element, its value, and the points of its chart

// The rows

for (const element of table.tBodies[0].rows) {
  rows.set(find("[data-name=text]", element).textContent, newRow(element));
}

function newRow(element) {
  return { element, value: find("[data-value]", element).textContent, points: [] };
}

function setName(element, name) {
  for (const place of element.querySelectorAll("[data-name=text]")) place.textContent = name;
  for (const place of element.querySelectorAll("[data-name=value]")) place.value = name;
}

/** Have the rows of these counters, in this order. One that stays is not touched: somebody may be typing in it. */
function showCounters(counters) {
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
      row = newRow(find("#row").content.firstElementChild.cloneNode(true));
      setName(row.element, name);
      table.tBodies[0].insertBefore(row.element, place);
      rows.set(name, row);
    }
    row.value = value;
    const cell = find("[data-value]", row.element);
    if (cell.textContent !== value) cell.textContent = value;
  }
  find("#none").hidden = counters.length > 0;
}

function showNext(name) {
  const link = find("#next");
  link.hidden = name === null;
  if (name === null) return;
  const query = new URLSearchParams(location.search);
  query.set("after", name);
  link.href = `${location.pathname}?${query}`;
}

/** Add to each row's chart what its counter is now, and say its rate. */
function chart(now) {
  for (const { element, value, points } of rows.values()) {
    points.push({ time: now, value: BigInt(value) });
    if (points.length > POINTS + 1) points.shift();
    const rates = points.slice(1).map((point, index) => rate(points[index], point));
    const lowest = Math.min(0, ...rates);
    const highest = Math.max(lowest < 0 ? 0 : 1e-9, ...rates); // nothing at all is drawn at the bottom
    const height = highest - lowest;
    const line = rates.map((r, index) => `${POINTS - rates.length + index + 1},${1 + (18 * (highest - r)) / height}`);
    find("polyline", element).setAttribute("points", line.join(" "));
    const first = points[Math.max(0, points.length - 1 - WINDOW)];
    find("[data-rate]", element).textContent = rates.length ? `${short(rate(first, points.at(-1)))}/s` : "";
  }
}

function rate(before, after) {
  return Number(after.value - before.value) / Math.max((after.time - before.time) / 1000, 0.001);
}

function short(number) {
  return number.toLocaleString("en", { maximumFractionDigits: Math.abs(number) < 100 ? 1 : 0 });
}

// The manager and the processes

const totals = []; // the last ones, each with its time

function showFigures(now) {
  for (const place of document.querySelectorAll("[data-figure]")) place.textContent = now[place.dataset.figure];
}

/** Say the rates of the last seconds. What did not happen in them has no mean: then the last one stands. */
function showMeans(time, now) {
  if (totals.length && (totals[0].epoch !== now.epoch || totals[0].pid !== now.pid)) totals.length = 0;
  totals.push({ ...now, time });
  if (totals.length > WINDOW + 1) totals.shift();
  if (totals.length < 2) return;
  const first = totals[0];
  const gained = (what) => now[what] - first[what];
  const say = (mean, total, number, unit) => {
    if (number > 0) find(`[data-mean=${mean}]`).textContent = `${(total / number).toFixed(2)} ${unit}`;
  };
  find("[data-mean=batches]").textContent = `${(gained("batches") / ((time - first.time) / 1000)).toFixed(1)}/s`;
  say("batch", gained("operations"), gained("batches"), "operations");
  say("commit", gained("commit_seconds") * 1000, gained("commits"), "ms");
  find("#basis").textContent = "The first three are means of the last seconds in which there were any.";
}

function showProcesses(processes) {
  find("#processes").tBodies[0].replaceChildren(
    ...processes.map(({ name, pid, uptime, restarts }) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      row.append(head);
      for (const text of [pid, uptime, restarts]) row.insertCell().textContent = text;
      return row;
    }),
  );
}

// What the page says

let saidOfUpdates = "";

function sayOfUpdates(sentence) {
  if (sentence === saidOfUpdates) return; // read aloud once
  saidOfUpdates = sentence;
  find("#updates").textContent = sentence;
}

function say(sentence, failed = false) {
  const place = find("#said");
  place.textContent = sentence;
  place.classList.toggle("failed", failed);
}

/** An error's sentence: the server's own, or that it does not answer. */
async function failure(answer) {
  try {
    return new Error((await answer.json()).detail);
  } catch {
    return new Error(`the server answered ${answer.status}`);
  }
}

function sentenceOf(error) {
  const none = error instanceof TypeError || error.name === "TimeoutError";
  return none ? "the server does not answer" : error.message;
}

// Asking again and again

let etag = null;
let found = null; // what is so, by the last answer that said it
let wait = PERIOD;
let timer = null;
let asking = false;
let askAgain = false;
let paused = false;

async function ask() {
  if (asking) {
    askAgain = true; // what is on its way may not know yet of what was just done
    return;
  }
  clearTimeout(timer);
  asking = true;
  try {
    const headers = etag === null ? {} : { "If-None-Match": etag };
    const answer = await fetch(table.dataset.live, { headers, signal: AbortSignal.timeout(PATIENCE) });
    if (answer.ok) {
      found = await answer.json();
      etag = answer.headers.get("ETag");
      showCounters(found.counters);
      showNext(found.next);
      if (found.manager) showFigures(found.manager.now);
      if (found.processes) showProcesses(found.processes);
    } else if (answer.status !== 304) {
      throw await failure(answer);
    }
    const now = performance.now();
    chart(now);
    if (found.manager) showMeans(now, found.manager.totals);
    wait = PERIOD;
    sayOfUpdates(paused ? "Paused." : "Up to date."); // paused: this was asked before, or for what was just done
  } catch (error) {
    wait = Math.min(wait * 2, LONGEST_PAUSE);
    sayOfUpdates(`Not up to date: ${sentenceOf(error)}. Still trying.`);
  }
  asking = false;
  if (askAgain) {
    askAgain = false;
    ask();
  } else if (!paused && !document.hidden) {
    timer = setTimeout(ask, wait);
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) ask();
});

pauseButton.addEventListener("click", () => {
  paused = !paused;
  pauseButton.setAttribute("aria-pressed", paused);
  clearTimeout(timer);
  if (paused) sayOfUpdates("Paused.");
  else ask();
});

// Doing

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.matches("[data-delete]")) {
    event.preventDefault();
    setName(sure, form.elements.name.value);
    sure.showModal();
  } else if (form.matches("[data-live]")) {
    event.preventDefault();
    await send(form);
  }
});

async function send(form) {
  const body = new URLSearchParams(new FormData(form));
  try {
    const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if (!answer.ok) throw await failure(answer);
    say((await answer.json()).sentence);
    if (form.elements.value) form.reset();
  } catch (error) {
    say(`Not done: ${sentenceOf(error)}.`, true);
  }
  if (sure?.open) {
    sure.close();
    find("#said").focus(); // the button that asked for it is about to go
  }
  ask();
}

table.classList.add("live");
find("#live").hidden = false;
ask();
