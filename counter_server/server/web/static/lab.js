// The lab: sends the clients, and shows which number each of them got.

const form = document.getElementById("lab");
const status = document.getElementById("status");
const grid = document.getElementById("grid");

let running = false;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = true;
  document.getElementById("start").setAttribute("aria-disabled", "true");
  grid.setAttribute("aria-busy", "true");
  try {
    await play(new URLSearchParams(new FormData(form)));
  } catch (error) {
    status.textContent = `The run failed: ${error.message}`;
  } finally {
    running = false;
    document.getElementById("start").removeAttribute("aria-disabled");
    grid.removeAttribute("aria-busy");
  }
});

async function play(choices) {
  document.getElementById("result").hidden = true;
  document.getElementById("story").hidden = true;
  status.textContent = "";
  const run = await ask(form.dataset.runs, choices);
  const board = new Board(run);
  document.getElementById("result").hidden = false;
  status.textContent = `${plural(run.clients, "client")} sent.`;
  const sent = Array.from({ length: run.clients }, async (_, index) => {
    try {
      board.add({ client: index + 1, ...(await ask(run.ask)) });
    } catch (error) {
      board.failures.push(error.message);
    }
  });
  await Promise.all(sent);
  board.finish();
  status.textContent = board.summary();
  tell(board);
  await fetch(run.run, { method: "DELETE" });
}

async function ask(url, body) {
  const response = await fetch(url, { method: "POST", body });
  const content = await response.json();
  if (!response.ok) throw new Error(content.detail);
  return content;
}

// The grid, with a cell for each number, and the answers until now.
class Board {
  constructor(run) {
    this.run = run;
    this.answers = []; // in the order in which they came
    this.given = new Map(); // number -> its answers
    this.workers = new Map(); // pid -> its letter
    this.failures = []; // the errors of clients that got no number
    this.cells = Array.from({ length: run.clients }, () => document.createElement("li"));
    grid.replaceChildren(...this.cells);
    document.getElementById("workers").replaceChildren();
    this.cells.forEach((_, index) => this.show(index + 1, "awaited", ""));
  }

  add(answer) {
    this.answers.push(answer);
    if (!this.workers.has(answer.worker)) this.workers.set(answer.worker, letter(this.workers.size));
    const givers = this.given.get(answer.number) ?? [];
    givers.push(answer);
    this.given.set(answer.number, givers);
    const letters = [...new Set(givers.map((giver) => this.workers.get(giver.worker)))].sort();
    this.show(answer.number, givers.length === 1 ? "unique" : "duplicate", `${givers.length}×`, letters);
    this.showWorkers();
  }

  finish() {
    this.cells.forEach((_, index) => {
      if (!this.given.has(index + 1)) this.show(index + 1, "skipped", "–");
    });
  }

  show(number, state, mark, letters = []) {
    const cell = this.cells[number - 1];
    if (!cell) return; // more than there are clients: only the table shows it
    const seen = [element("b", number), element("small", mark), element("small", some(letters))];
    seen.forEach((part) => part.setAttribute("aria-hidden", "true"));
    const times = state === "duplicate" ? `, ${mark.slice(0, -1)} times` : "";
    const by = letters.length ? `, by worker ${letters.join(" and ")}` : "";
    const words = element("span", `${number}: ${state}${times}${by}`);
    words.className = "visually-hidden";
    cell.className = state;
    cell.replaceChildren(...seen, words);
  }

  showWorkers() {
    const rows = [...this.workers].map(([pid, name]) => {
      const answered = this.answers.filter((answer) => answer.worker === pid).length;
      return element("li", `${name}: worker process ${pid}, ${plural(answered, "answer")}`);
    });
    document.getElementById("workers").replaceChildren(...rows);
  }

  summary() {
    const repeated = [...this.given.values()].filter((givers) => givers.length > 1);
    const unlucky = repeated.reduce((sum, givers) => sum + givers.length, 0);
    const skipped = this.cells.filter((_, index) => !this.given.has(index + 1)).length;
    const words = [
      `${this.given.size - repeated.length} unique`,
      `${plural(repeated.length, "duplicate")}${repeated.length ? ` (given to ${unlucky} clients)` : ""}`,
      `${skipped} skipped`,
    ];
    const lost = this.failures.length;
    const failed = lost ? ` ${plural(lost, "client")} got no number: ${[...new Set(this.failures)].join("; ")}.` : "";
    return `${plural(this.run.clients, "client")}: ${words.join(", ")}.${failed}`;
  }

  worker(answer) {
    return `worker ${this.workers.get(answer.worker)}`;
  }
}

// The story of the run: why it was right or wrong, and the four steps of two of its clients.
function tell(board) {
  const { run } = board;
  const pair = collision(board) ?? neighbours(board);
  const wrong = board.given.size < board.answers.length;
  document.getElementById("why").textContent = wrong ? run.wrong : run.right;
  document.getElementById("steps").replaceChildren(...(pair ? steps(board, pair) : []));
  document.getElementById("expected").textContent = pair ? verdict(pair) : "";
  const rows = [...board.answers].sort((one, other) => one.client - other.client).map((answer) => {
    const row = document.createElement("tr");
    const pid = `${answer.worker} (${board.workers.get(answer.worker)})`;
    row.append(...[answer.client, answer.number, pid].map((text) => element("td", text)));
    return row;
  });
  document.getElementById("answers").replaceChildren(...rows);
  document.getElementById("story").hidden = board.answers.length === 0;
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

function steps(board, pair) {
  const events = pair.flatMap((answer) => [
    { answer, at: answer.began, text: beginning(board, answer) },
    { answer, at: answer.ended, text: ending(board, answer) },
  ]);
  events.sort((one, other) => one.at - other.at);
  const [first, second] = events;
  return events.map((event) => {
    const between = event === second && event.answer !== first.answer;
    const text = between ? `before client ${first.answer.client} has its answer, ${event.text}` : event.text;
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

function verdict([one, other]) {
  const low = Math.min(one.number, other.number);
  const same = one.number === other.number;
  const numbers = `${low} and ${low + 1}`;
  return same ? `They should get ${numbers}, and got ${low} and ${low}.` : `${capital(numbers)}, as expected.`;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function letter(index) {
  return index < 26 ? String.fromCharCode(65 + index) : `#${index + 1}`;
}

function some(letters) {
  return letters.length > 3 ? `${letters.slice(0, 2).join(" ")} +${letters.length - 2}` : letters.join(" ");
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
