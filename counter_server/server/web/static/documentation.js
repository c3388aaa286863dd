/* Sends the requests of the API's page from its forms, and writes each as a command. The page is complete without it. */

import "./copy.js";

const SHOWN = ["Content-Type", "Idempotent-Replayed", "RateLimit", "RateLimit-Policy", "Retry-After", "WWW-Authenticate"];

/** Return what the form's fields say: the request's URL, headers and body. An empty field is left out. */
function read(form) {
  let url = form.dataset.url;
  const query = new URLSearchParams();
  const headers = {};
  const members = [];
  for (const { name, value, dataset } of form.querySelectorAll("input")) {
    if (dataset.in === "path") url = url.replace(`{${name}}`, encodeURIComponent(value));
    else if (!value) continue;
    else if (dataset.in === "query") query.append(name, value);
    else if (dataset.in === "header") headers[name] = value;
    else members.push(`${JSON.stringify(name)}:${/^-?\d+$/.test(value) ? value : JSON.stringify(value)}`); // exact
  }
  if (query.size) url += `?${query}`;
  return { url, headers, body: members.length ? `{${members}}` : undefined };
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function command(form, { url, headers, body }) {
  const words = ["curl"];
  if (form.dataset.method !== "GET") words.push("--request", form.dataset.method);
  for (const [name, value] of Object.entries(headers)) words.push("--header", quoted(`${name}: ${value}`));
  if (body) words.push("--json", quoted(body));
  words.push(quoted(url));
  if ("operators" in form.dataset) words.push('--header "Authorization: Bearer $COUNTER_SERVER_TOKEN"');
  return words.join(" ");
}

async function send(form) {
  const { url, headers, body } = read(form);
  const place = form.querySelector(".answer");
  const status = document.createElement("p");
  try {
    if (body) headers["Content-Type"] = "application/json";
    const answer = await fetch(url, { method: form.dataset.method, headers, body });
    const lines = SHOWN.filter((name) => answer.headers.has(name)).map((name) => `${name}: ${answer.headers.get(name)}`);
    const text = document.createElement("pre");
    status.textContent = `${answer.status} ${answer.statusText}`;
    status.className = answer.ok ? "" : "failed";
    text.tabIndex = 0;
    text.textContent = [...lines, "", await answer.text()].join("\n").trim();
    place.replaceChildren(status, text);
  } catch (error) {
    status.textContent = `No answer: ${error.message}. Ask again; with the same Idempotency-Key nothing counts twice.`;
    status.className = "failed";
    place.replaceChildren(status);
  }
}

for (const form of document.querySelectorAll("form.try")) {
  const code = form.parentElement.querySelector(".copy code");
  form.hidden = false;
  form.addEventListener("input", () => (code.textContent = command(form, read(form))));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
}
