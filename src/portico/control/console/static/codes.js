// Copy and print for recovery codes. Without it they can be selected, and the browser's own menu prints.
"use strict";

const codes = document.querySelector(".codes");
for (const button of document.querySelectorAll("[data-act]")) {
  if (button.dataset.act === "copy" && !navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    if (button.dataset.act === "print") return print();
    const said = document.querySelector("[role=status]");
    const text = [...codes.querySelectorAll("code")].map((code) => code.textContent).join("\n");
    try {
      await navigator.clipboard.writeText(`${text}\n`);
      said.textContent = "Copied.";
    } catch {
      said.textContent = "The browser does not let this page copy: select them, and copy by hand.";
    }
  });
}
