/* Shows the page as soon as there is a manager. */

import "./copy.js";

setInterval(async () => {
  try {
    const text = await (await fetch(location.href)).text();
    if (!text.includes('id="waiting"')) location.reload();
  } catch {
    // The server is away: the next question may find it.
  }
}, 2000);
