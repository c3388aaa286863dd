/* Counts the number up when others visit, and shows their visits. The page works without this script too. */

import { addButtons } from "./copy.js";

const PERIOD = 2000; // milliseconds from an answer to the next request
const PAUSE = 15000; // milliseconds after a request without an answer
const STEPS = 20; // pictures of the number on its way up

const number = document.getElementById("number");
const rows = document.querySelector("#visits tbody");
const kill = document.querySelector(".kill");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let shown = BigInt(number.dataset.number);
let timer;

async function ask() {
  clearTimeout(timer);
  if (document.hidden) return;
  let pause = PERIOD;
  try {
    const answer = await fetch(`${number.dataset.live}?after=${shown} ${number.dataset.pids}`);
    if (!answer.ok) throw new Error(answer.status);
    if (answer.status === 200) show(await answer.json());
  } catch {
    pause = PAUSE; // what is shown stays, and stays true
  }
  clearTimeout(timer);
  timer = setTimeout(ask, pause);
}

function show(news) {
  const from = shown;
  shown = BigInt(news.number);
  if (rows) rows.innerHTML = news.rows;
  if (kill && news.kill && news.pids !== number.dataset.pids) {
    kill.innerHTML = news.kill;
    addButtons(kill);
  }
  number.dataset.pids = news.pids;
  climb(from, shown, calm.matches ? STEPS : 1);
}

function climb(from, to, step) {
  if (to !== shown) return; // a later answer climbs from there
  const said = (from + ((to - from) * BigInt(step)) / BigInt(STEPS)).toLocaleString("en");
  number.textContent = said;
  number.className = said.length > 9 ? "longest" : said.length > 5 ? "long" : ""; // as the template does
  if (step < STEPS) requestAnimationFrame(() => climb(from, to, step + 1));
}

document.addEventListener("visibilitychange", ask);
timer = setTimeout(ask, PERIOD);
