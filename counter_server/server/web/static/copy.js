/* Gives each command of a page a button that copies it. A browser allows that on a safe connection and on loopback. */

export function addButtons(within) {
  for (const place of navigator.clipboard ? within.querySelectorAll(".copy") : []) {
    const button = document.createElement("button");
    const said = document.createElement("span");
    button.type = "button";
    button.className = "quiet";
    said.setAttribute("aria-live", "polite");
    said.textContent = "Copy";
    button.append(said);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(place.querySelector("code").textContent);
        said.textContent = "Copied";
      } catch {
        said.textContent = "Refused by the browser";
      }
      setTimeout(() => (said.textContent = "Copy"), 2000);
    });
    place.append(button);
  }
}

addButtons(document);
