/* Asks the server again and again, and sends forms in place. The pages work without it too. */

const PERIOD = 1000; // milliseconds from an answer to the next request
const LONGEST_PAUSE = 30000; // milliseconds between requests without an answer
const PATIENCE = 10000; // milliseconds to wait for an answer

export const find = (selector, within = document) => within.querySelector(selector);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // a selection stays, and screen readers stay silent
}

// Requests, again and again

let address = null; // a function that returns the URL to ask
let show = null; // called with each new answer
let tick = null; // called with the last answer after each answer, whether it is new or not
let etag = null;
let known = null; // the URL that has it
let found = null; // the content of the last answer with any
let wait = PERIOD;
let timer = null;
let asking = false;
let askAgain = false;
let paused = false;

export function keepAsking(options) {
  ({ address, show, tick } = options);
  find("#live").hidden = false;
  ask();
}

export async function ask() {
  if (asking) {
    askAgain = true; // the answer under way may be older than the last change
    return;
  }
  clearTimeout(timer);
  asking = true;
  const asked = address();
  try {
    const headers = etag !== null && asked === known ? { "If-None-Match": etag } : {};
    const answer = await fetch(asked, { headers, signal: AbortSignal.timeout(PATIENCE) });
    if (answer.ok) {
      const content = await answer.json();
      if (asked === address()) {
        found = content;
        etag = answer.headers.get("ETag");
        known = asked;
        show(found);
      }
    } else if (answer.status !== 304) {
      throw await failure(answer);
    }
    if (asked === address()) tick(found);
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

function showState(sentence) {
  setText(find("#updates"), sentence);
}

document.addEventListener("visibilitychange", () => {
  if (address && !document.hidden && !paused) ask();
});

find("#pause")?.addEventListener("click", ({ target }) => {
  paused = !paused;
  target.setAttribute("aria-pressed", paused);
  clearTimeout(timer);
  if (paused) showState("Paused.");
  else ask();
});

// Forms

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("[data-live]")) return;
  event.preventDefault();
  const dialog = form.closest("dialog");
  const place = dialog ? find("[role=alert]", dialog) : find("#said");
  try {
    const body = new URLSearchParams(new FormData(form, event.submitter));
    const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if (!answer.ok) throw await failure(answer);
    const { sentence } = await answer.json();
    if (!("keeps" in form.dataset)) form.reset();
    dialog?.close("done");
    say(find("#said"), sentence);
  } catch (error) {
    say(place, `Not done: ${sentenceOf(error)}.`, true);
  }
  ask();
});

function say(place, sentence, failed = false) {
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
