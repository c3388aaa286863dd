/* Keeps the page of one counter up to date. */

import { Rates, draw, perSecond, scaleFor } from "./chart.js";
import "./copy.js";
import { find, keepAsking, setText } from "./live.js";

const MOST_CHANGES = 8; // that the page shows

const place = find("#value");
const changes = find("#changes table");
const opened = BigInt(place.textContent);
let value = opened; // null: there is no such counter
let rates = new Rates();

function show(found) {
  const now = found.value === null ? null : BigInt(found.value);
  if (now === value) return;
  const row = document.createElement("tr");
  const difference = now === null || value === null ? "" : signed(now - value);
  for (const text of [new Date().toLocaleTimeString("en-GB"), now === null ? "deleted" : `${now}`, difference]) {
    const cell = document.createElement("td");
    cell.textContent = text;
    cell.className = row.cells.length ? "number" : "";
    row.append(cell);
  }
  changes.tBodies[0].prepend(row);
  while (changes.tBodies[0].rows.length > MOST_CHANGES) changes.tBodies[0].lastElementChild.remove();
  changes.hidden = false;
  find("#unchanged").hidden = true;
  if (now === null || value === null) rates = new Rates();
  value = now;
  setText(place, now === null ? "deleted" : `${now}`);
  setText(find("#since"), now === null ? "deleted" : signed(now - opened));
}

function signed(difference) {
  return difference > 0n ? `+${difference.toLocaleString("en")}` : difference.toLocaleString("en");
}

function tick() {
  if (value !== null) rates.add(value);
  const scale = scaleFor([rates]);
  draw(find(".chart"), rates, scale);
  setText(find("#rate"), rates.words || "…");
  setText(find("#highest"), perSecond(scale.highest));
  setText(find("#lowest"), perSecond(scale.lowest));
}

find("#rates").hidden = false;
find("#changes").hidden = false;
keepAsking({ address: () => place.dataset.live, show, tick });
