// The lab: sends the clients of both sides, and shows which number each of them got.

const form = document.getElementById("lab");
const start = document.getElementById("start");
const copy = document.getElementById("copy");
const status = document.getElementById("status");
const result = document.getElementById("result");
const story = document.getElementById("story");

let running = false;

form.addEventListener("change", () => running || prepare());

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = true;
  start.setAttribute("aria-disabled", "true");
  result.setAttribute("aria-busy", "true");
  history.replaceState(null, "", `?${choices()}`);
  try {
    await play();
  } catch (error) {
    tell(`This race ended early: ${error.message}. Start it again.`, true);
  } finally {
    running = false;
    start.removeAttribute("aria-disabled");
    result.removeAttribute("aria-busy");
  }
});

copy.addEventListener("click", async () => {
  if (!form.reportValidity()) return;
  history.replaceState(null, "", `?${choices()}`);
  try {
    await navigator.clipboard.writeText(location.href);
    tell("The link to this race is copied. Opened anywhere on this server, it makes the same choices.");
  } catch { // there is no clipboard without https, or it was refused
    tell("The browser gave no access to its clipboard: copy the link from the address bar.", true);
  }
});

function choices() {
  return new URLSearchParams(new FormData(form));
}

// Empty boards for the choices of the form.
function prepare() {
  const clients = document.getElementById("clients");
  const chosen = form.querySelector("input[name=strategy]:checked");
  if (!clients.validity.valid) return undefined;
  const about = document.getElementById(chosen.getAttribute("aria-describedby"));
  document.getElementById("wrong-title").textContent = chosen.labels[0].textContent;
  document.querySelector("#wrong .about").textContent = about.textContent;
  const workers = new Map(); // pid -> its place among the workers that both sides met
  const count = Number(clients.value);
  story.hidden = true;
  showWorkers(workers, []);
  tell(`${plural(count, "client")} will ask each side at the same moment.`);
  return ["wrong", "ours"].map((id) => new Board(id, count, workers));
}

async function play() {
  const boards = prepare();
  const [wrong, ours] = boards;
  const begin = (strategy) => ask(form.dataset.runs, new URLSearchParams({ strategy, clients: wrong.clients }));
  [wrong.run, ours.run] = await Promise.all([choices().get("strategy"), form.dataset.ours].map(begin));
  tell(`${plural(wrong.clients, "client")} sent to each side.`);
  if (matchMedia("(max-width: 40rem)").matches) status.scrollIntoView(); // there both sides lie below the window
  const send = async (board, client) => {
    try {
      board.add({ client, ...(await ask(board.run.ask)) });
    } catch (error) {
      board.fail(error);
    }
    showWorkers(wrong.workers, boards);
  };
  // The browser keeps a few connections and a queue: the sides take turns in it.
  const numbers = Array.from({ length: wrong.clients }, (_, index) => index + 1);
  await Promise.all(numbers.flatMap((client) => boards.map((board) => send(board, client))));
  boards.forEach((board) => board.finish());
  showAnswers(boards);
  story.hidden = boards.every((board) => board.answers.length === 0);
  tell(boards.map((board) => board.summary()).join(" "));
  await Promise.all(boards.map((board) => fetch(board.run.run, { method: "DELETE" })));
}

async function ask(url, body) {
  const response = await fetch(url, { method: "POST", body }).catch(() => {
    throw new Error("the server did not answer");
  });
  const content = await response.json();
  if (!response.ok) throw new Error(content.detail);
  return content;
}

function tell(text, failed = false) {
  status.textContent = text;
  status.className = failed ? "note failed" : "small";
}

// One side: a cell for each number, and the answers until now.
class Board {
  constructor(id, clients, workers) {
    this.place = document.getElementById(id);
    this.story = document.getElementById(`${id}-story`);
    this.title = this.find(`#${id}-title`).textContent;
    this.clients = clients;
    this.workers = workers;
    this.answers = []; // in the order in which they came
    this.given = new Map(); // number -> its answers
    this.failures = []; // the errors of clients that got no number
    this.cells = Array.from({ length: clients }, () => document.createElement("li"));
    this.find(".cells").replaceChildren(...this.cells);
    this.cells.forEach((_, index) => this.show(index + 1, "awaited", ""));
    this.judge("No number yet", clients === 1 ? "1 is right" : `1 to ${clients}, each once, is right`);
    this.find(".failed").hidden = true;
  }

  find(selector) {
    return this.place.querySelector(selector);
  }

  add(answer) {
    this.answers.push(answer);
    if (!this.workers.has(answer.worker)) this.workers.set(answer.worker, this.workers.size);
    const givers = this.given.get(answer.number) ?? [];
    givers.push(answer);
    this.given.set(answer.number, givers);
    const places = [...new Set(givers.map((giver) => this.workers.get(giver.worker)))].sort((a, b) => a - b);
    const once = givers.length === 1;
    this.show(answer.number, once ? "unique" : "duplicate", once ? letter(places[0]) : `${givers.length}×`, places);
    this.judge(...this.verdict());
  }

  fail(error) {
    this.failures.push(error.message);
    const place = this.find(".failed");
    place.textContent = `${plural(this.failures.length, "client")} got no number: ${[...new Set(this.failures)].join("; ")}.`;
    place.hidden = false;
  }

  finish() {
    this.cells.forEach((_, index) => {
      if (!this.given.has(index + 1)) this.show(index + 1, "skipped", "–");
    });
    const wrong = this.given.size < this.answers.length;
    const outcome = wrong ? "bad" : this.skipped() ? "" : "good"; // a client without a number has no wrong one
    const [found, how] = this.verdict();
    this.judge(`${{ bad: "✗ ", good: "✓ " }[outcome] ?? ""}${found}`, how, outcome);
    const pair = collision(this) ?? neighbours(this);
    const events = pair ? timeline(this, pair) : [];
    this.story.querySelector(".why").textContent = this.answers.length ? (wrong ? this.run.wrong : this.run.right) : "";
    this.story.querySelector(".lanes").replaceChildren(...(pair ? [lanes(this, events)] : []));
    this.story.querySelector(".steps").replaceChildren(...steps(events));
    this.story.querySelector("details").hidden = events.length === 0;
    this.story.querySelector(".expected").textContent = pair ? expected(pair) : "";
    this.story.hidden = this.answers.length === 0;
  }

  show(number, state, mark, places = []) {
    const cell = this.cells[number - 1];
    if (!cell) return; // more than there are clients: only the table shows it
    const strips = places.map((place) => element("i", "", `w${place % 8}`));
    const seen = [element("b", number), element("small", mark), ...strips];
    seen.forEach((part) => part.setAttribute("aria-hidden", "true"));
    const times = state === "duplicate" ? `, ${mark.slice(0, -1)} times` : "";
    const by = places.length ? `, by worker ${places.map(letter).join(" and ")}` : "";
    cell.className = places.length === 1 ? `${state} w${places[0] % 8}` : state;
    cell.replaceChildren(...seen, element("span", `${number}: ${state}${times}${by}`, "visually-hidden"));
  }

  verdict() {
    const different = this.given.size;
    const repeated = [...this.given.values()].filter((givers) => givers.length > 1).length;
    if (different === 1) return ["1 number", `given ${this.answers.length > 1 ? `${this.answers.length} times` : "once"}`];
    return [`${different} different numbers`, repeated ? `${repeated} given twice or more` : "each once"];
  }

  judge(found, how, outcome = "") {
    const place = this.find(".verdict");
    place.replaceChildren(element("b", found), ` ${how}`);
    place.className = `verdict ${outcome}`;
  }

  skipped() {
    return this.cells.filter((_, index) => !this.given.has(index + 1)).length;
  }

  summary() {
    const skipped = this.skipped() ? `, ${this.skipped()} skipped` : "";
    const failed = this.failures.length ? ` ${this.find(".failed").textContent}` : "";
    return `${this.title}: ${this.verdict().join(", ")}${skipped}.${failed}`;
  }

  worker(answer) {
    return `worker ${letter(this.workers.get(answer.worker))}`;
  }
}

function showWorkers(workers, boards) {
  const answers = boards.flatMap((board) => board.answers);
  const rows = [...workers].map(([pid, place]) => {
    const answered = answers.filter((answer) => answer.worker === pid).length;
    return element("li", `${letter(place)} · worker process ${pid}, ${plural(answered, "answer")}`, `worker w${place % 8}`);
  });
  document.getElementById("workers").replaceChildren(...rows);
}

// The table with every client of both sides.
function showAnswers(boards) {
  const found = boards.map((board) => new Map(board.answers.map((answer) => [answer.client, answer])));
  const rows = Array.from({ length: boards[0].clients }, (_, index) => {
    const row = document.createElement("tr");
    row.append(element("td", index + 1));
    boards.forEach((board, side) => {
      const answer = found[side].get(index + 1);
      const worker = document.createElement("td");
      if (answer) {
        const place = board.workers.get(answer.worker);
        worker.append(element("span", `${letter(place)} · ${answer.worker}`, `worker w${place % 8}`));
      }
      row.append(element("td", answer ? answer.number : "none"), worker);
    });
    return row;
  });
  document.getElementById("answers").replaceChildren(...rows);
}

// Two clients that got the same number: preferably in one worker, with both reads before either write.
function collision(board) {
  return best([...board.given.values()].flatMap(pairs));
}

// Two clients that got consecutive numbers: preferably at the same time, in different workers.
function neighbours(board) {
  const found = board.answers.flatMap((one) => (board.given.get(one.number + 1) ?? []).map((other) => [one, other]));
  return best(found, (one, other) => one.worker !== other.worker);
}

function best(found, fits = (one, other) => one.worker === other.worker) {
  const worth = ([one, other]) => 2 * overlap(one, other) + fits(one, other);
  return found.reduce((most, pair) => (most && worth(most) >= worth(pair) ? most : pair), undefined);
}

function pairs(givers) {
  return givers.slice(1).map((giver, index) => [givers[index], giver]);
}

function overlap(one, other) {
  return one.began < other.ended && other.began < one.ended;
}

// The two recorded steps of each of two clients, the earliest first.
function timeline(board, pair) {
  const events = pair.flatMap((answer) => [
    { answer, at: answer.began, text: beginning(board, answer), label: answer.read === null ? "asks" : `reads ${answer.read}` },
    { answer, at: answer.ended, text: ending(board, answer), label: `${answer.read === null ? "gets" : "writes"} ${answer.number}` },
  ]);
  return events.sort((one, other) => one.at - other.at);
}

// The same in words.
function steps(events) {
  return events.map((event, index) => {
    const first = events[0].answer;
    const between = index === 1 && event.answer !== first;
    const text = between ? `before client ${first.client} has its answer, ${event.text}` : event.text;
    return element("li", `${capital(text)}.`);
  });
}

function beginning(board, answer) {
  const asks = `client ${answer.client} asks ${board.worker(answer)}, which`;
  if (answer.read === null) return `${asks} asks ${board.run.place} for one more`;
  return `${asks} reads ${answer.read} from ${board.run.place}`;
}

function ending(board, answer) {
  const result = `client ${answer.client} gets ${answer.number}`;
  if (answer.read === null) return `${board.run.place} has answered ${board.worker(answer)}: ${result}`;
  return `${board.worker(answer)} writes ${answer.number} to ${board.run.place}: ${result}`;
}

function expected([one, other]) {
  const low = Math.min(one.number, other.number);
  const same = one.number === other.number;
  const numbers = `${low} and ${low + 1}`;
  return same ? `They should get ${numbers}, and got ${low} and ${low}.` : `${capital(numbers)}, as expected.`;
}

// A lane for each client; time goes down. The list of steps says the same.
function lanes(board, events) {
  const svg = draw("svg", { viewBox: "0 0 320 224" });
  const clients = [...new Set(events.map((event) => event.answer))];
  const same = clients[0].number === clients[1].number;
  const y = (index) => 60 + 46 * index;
  clients.forEach((answer, lane) => {
    const x = 120 + 136 * lane;
    const place = board.workers.get(answer.worker);
    const own = events.flatMap((event, index) => (event.answer === answer ? [index] : []));
    const [from, to] = own.map(y);
    const group = draw("g", { class: `w${place % 8}` });
    group.append(
      draw("circle", { cx: x - 38, cy: 14, r: 6 }),
      draw("text", { x: x - 26, y: 14, class: "head" }, `Client ${answer.client} · ${letter(place)}`),
      draw("path", { d: `M${x} 32V220` }),
      draw("rect", { x: x - 40, y: from, width: 80, height: to - from, class: "taken" }),
      draw("text", { x, y: (from + to) / 2 }, answer.read === null ? "waits" : `${answer.read} + 1 = ${answer.number}`),
    );
    own.forEach((index, step) => {
      const lost = same && step === 1 ? " lost" : "";
      group.append(
        draw("rect", { x: x - 46, y: y(index) - 13, width: 92, height: 26, rx: 13, class: `step${lost}` }),
        draw("text", { x, y: y(index), class: lost }, events[index].label),
      );
    });
    svg.append(group);
  });
  const times = events.map((event, index) => {
    const passed = ((event.at - events[0].at) * 1000).toFixed(1);
    return draw("text", { x: 28, y: y(index), class: "time" }, index ? `+${passed} ms` : "0 ms");
  });
  svg.append(...times);
  return svg;
}

function draw(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.textContent = text;
  return made;
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function letter(index) {
  return index < 26 ? String.fromCharCode(65 + index) : `#${index + 1}`;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

prepare();
copy.hidden = false;
result.hidden = false;
