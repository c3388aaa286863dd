/* Keeps the dashboard up to date and sends its forms in place. The page works without this script too. */

const PERIOD = 1000; // milliseconds from an answer to the next request
const LONGEST_PAUSE = 30000; // milliseconds between requests without an answer
const PATIENCE = 10000; // milliseconds to wait for an answer
const POINTS = 60; // in a chart
const WINDOW = 5; // points in the mean of a rate in words

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

/** Show rows for these counters, in this order. A row that stays is not touched: somebody may be typing in it. */
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

/** Add each counter's value to its row's chart, and show its rate. */
function chart(now) {
  for (const { element, value, points } of rows.values()) {
    points.push({ time: now, value: BigInt(value) });
    if (points.length > POINTS + 1) points.shift();
    const rates = points.slice(1).map((point, index) => rate(points[index], point));
    const lowest = Math.min(0, ...rates);
    const highest = Math.max(lowest < 0 ? 0 : 1e-9, ...rates); // a rate of 0 is drawn at the bottom
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
    if (number > 0) find(`[data-mean=${mean}]`).textContent = `${(total / number).toFixed(2)} ${unit}`;
  };
  find("[data-mean=batches]").textContent = `${(gained("batches") / ((time - first.time) / 1000)).toFixed(1)}/s`;
  say("batch", gained("operations"), gained("batches"), "operations");
  say("commit", gained("commit_seconds") * 1000, gained("commits"), "ms");
  find("#basis").textContent = "The first three are means over the last seconds with traffic.";
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

function showState(sentence) {
  const place = find("#updates");
  if (place.textContent !== sentence) place.textContent = sentence; // screen readers read each change aloud
}

function say(sentence, failed = false) {
  const place = find("#said");
  place.textContent = sentence;
  place.classList.toggle("failed", failed);
}

/** Make an error from the server's problem document, or from its status. */
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

// Requests, again and again

let etag = null;
let found = null; // the content of the last answer with any
let wait = PERIOD;
let timer = null;
let asking = false;
let askAgain = false;
let paused = false;

async function ask() {
  if (asking) {
    askAgain = true; // the answer under way may be older than the last change
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
      for (const place of document.querySelectorAll("[data-figure]")) {
        place.textContent = found.manager.now[place.dataset.figure];
      }
      if (found.processes) showProcesses(found.processes);
    } else if (answer.status !== 304) {
      throw await failure(answer);
    }
    const now = performance.now();
    chart(now);
    if (found.manager) showMeans(now, found.manager.totals);
    wait = PERIOD;
    showState(paused ? "Paused." : "Up to date."); // paused: the request was sent before, or after a change
  } catch (error) {
    wait = Math.min(wait * 2, LONGEST_PAUSE);
    showState(`Not up to date: ${sentenceOf(error)}. Still trying.`);
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
  if (paused) showState("Paused.");
  else ask();
});

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
    find("#said").focus(); // the button that opened the dialog is about to disappear
  }
  ask();
}

table.classList.add("live");
find("#live").hidden = false;
ask();
