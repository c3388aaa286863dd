/* Rates of counters, their charts, and the words that name one point of a chart. */

const SECONDS = 60; // of a chart
const WINDOW = 5; // points in the mean of a rate in words

/** The last values of a counter, and the rates between them, per second. */
export class Rates {
  points = []; // each with its time in milliseconds, its value, and the rate since the one before

  add(value, time = performance.now()) {
    const point = { time, value: BigInt(value), at: new Date() };
    const before = this.points.at(-1);
    if (before) point.rate = rate(before, point);
    this.points.push(point);
    while (this.points.length > WINDOW + 1 && this.points[0].time < time - SECONDS * 1000) this.points.shift();
  }

  /** Return the points that a chart shows: those with a rate. */
  get shown() {
    const latest = this.points.at(-1)?.time ?? 0;
    return this.points.filter((point) => "rate" in point && point.time >= latest - SECONDS * 1000);
  }

  /** Return the rate of the last seconds in words; it is empty at first. */
  get words() {
    const first = this.points[Math.max(0, this.points.length - 1 - WINDOW)];
    return this.points.length > 1 ? perSecond(rate(first, this.points.at(-1))) : "";
  }
}

function rate(before, after) {
  return Number(after.value - before.value) / Math.max((after.time - before.time) / 1000, 0.001);
}

export function perSecond(number) {
  return `${inWords(number)}/s`;
}

/** Return a rate in few characters: 3.5, 12,345 or 2.1M. */
export function inWords(rate) {
  const size = Math.abs(rate);
  return rate.toLocaleString("en", { maximumFractionDigits: size < 100 || size >= 1e6 ? 1 : 0, notation: size < 1e6 ? "standard" : "compact" });
}

/** Return the least and the greatest rate of a scale for all of these, in round numbers. */
export function scaleFor(all) {
  let [lowest, highest] = [0, 0];
  for (const rates of all) {
    for (const point of rates.shown) {
      lowest = Math.min(lowest, point.rate);
      highest = Math.max(highest, point.rate);
    }
  }
  return { lowest: 0 - roundUp(-lowest), highest: lowest < 0 ? roundUp(highest) : Math.max(1, roundUp(highest)) };
}

function roundUp(number) {
  if (number <= 0) return 0;
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= number * (1 - 1e-9)) ?? number;
}

const charts = new WeakMap(); // by element: the points that it shows
let pointed = null; // the chart and the index of the point that the words below it name

export function draw(element, rates, { lowest, highest }) {
  const points = rates.shown;
  charts.set(element, points);
  const latest = points.at(-1)?.time ?? 0;
  const y = (value) => 1 + (18 * (highest - value)) / (highest - lowest);
  for (const point of points) point.x = SECONDS - (latest - point.time) / 1000;
  const line = points.map((point) => `${point.x.toFixed(2)},${y(point.rate).toFixed(2)}`);
  element.querySelector("polyline").setAttribute("points", line.join(" "));
  const ground = points.length ? [`${points[0].x.toFixed(2)},${y(0)}`, ...line, `60,${y(0)}`] : [];
  element.querySelector("polygon").setAttribute("points", ground.join(" "));
  element.querySelector(".zero").setAttribute("d", `M0,${y(0)}H60`);
  if (pointed?.element === element) point(element, pointed.kept ? pointed.index : points.length - 1);
}

// Words for one point, below the pointer or the focus

const words = document.createElement("p");
words.id = "words";
words.hidden = true;
words.setAttribute("aria-hidden", "true"); // the chart has them as its text
document.body.append(words);

function point(element, index, kept = pointed?.kept ?? false) {
  const points = charts.get(element) ?? [];
  const at = Math.max(0, Math.min(points.length - 1, index));
  pointed = { element, index: at, kept: kept && at < points.length - 1 };
  const found = points[at];
  const text = found ? `${found.at.toLocaleTimeString("en-GB")}: ${perSecond(found.rate)}` : "no rate yet";
  element.setAttribute("aria-valuenow", found ? Math.round(found.x - SECONDS) : 0);
  element.setAttribute("aria-valuetext", text);
  element.querySelector(".at").setAttribute("d", found ? `M${found.x},0V20` : "");
  words.textContent = text;
  words.hidden = false;
  const place = element.getBoundingClientRect();
  const middle = place.left + (place.width * (found?.x ?? SECONDS)) / SECONDS;
  const half = words.offsetWidth / 2 + 4;
  words.style.left = `${Math.max(half, Math.min(document.documentElement.clientWidth - half, middle))}px`;
  words.style.top = `${place.bottom + 4}px`;
}

function leave() {
  pointed?.element.querySelector(".at").setAttribute("d", "");
  pointed = null;
  words.hidden = true;
}

document.addEventListener("pointermove", (event) => {
  const element = event.target.closest?.(".chart");
  if (element) {
    const place = element.getBoundingClientRect();
    const x = (SECONDS * (event.clientX - place.left)) / place.width;
    const distances = (charts.get(element) ?? []).map((each) => Math.abs(each.x - x));
    point(element, distances.indexOf(Math.min(...distances)), true);
  } else if (pointed && pointed.element !== document.activeElement) {
    leave();
  }
});
document.addEventListener("focusin", (event) => {
  if (event.target.matches(".chart")) point(event.target, Infinity);
  else leave();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && pointed) leave();
  if (!event.target.matches?.(".chart")) return;
  const { index = Infinity } = pointed?.element === event.target ? pointed : {};
  const next = { ArrowLeft: index - 1, ArrowDown: index - 1, ArrowRight: index + 1, ArrowUp: index + 1, Home: 0, End: Infinity };
  if (!(event.key in next)) return;
  event.preventDefault();
  point(event.target, next[event.key], true);
});
document.addEventListener("scroll", leave, { passive: true });
