// A photo that is pasted anywhere on the page, with the keys for it, is taken as if it had been chosen. Gradio's
// own button needs the right to read the clipboard, which browsers ask for, and only over HTTPS or loopback.

document.addEventListener("paste", async (event) => {
  const photo = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
  const place = document.querySelector("#photo");
  if (!photo || !place?.checkVisibility()) return;
  // Some programs copy text together with its picture: in a field, the text is meant.
  const field = event.target.closest?.("input, textarea, [contenteditable]");
  if (field && event.clipboardData.getData("text/plain")) return;
  event.preventDefault();
  const input = () => place.querySelector("input[type=file]");
  if (!input()) {
    // The camera is in its place.
    place.querySelector("[data-testid=source-select] button")?.click();
    for (let frames = 0; frames < 30 && !input(); frames++) await new Promise(requestAnimationFrame);
  }
  if (!input()) return;
  const given = new DataTransfer();
  given.items.add(photo);
  input().files = given.files;
  input().dispatchEvent(new Event("change", { bubbles: true }));
});
