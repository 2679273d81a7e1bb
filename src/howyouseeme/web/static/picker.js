// The first frame of a video: the target's box is drawn on it with the pointer.
// Runs in Gradio's HTML component, which gives `element`, `props`, `watch` and `trigger`.

const root = element.querySelector(".hysm");
const canvas = root.querySelector("canvas");
let frame = null;
let box = null; // x0, y0, x1, y1 in pixels of the video
let from = null;

function draw() {
  if (!frame) return;
  const pen = canvas.getContext("2d");
  pen.drawImage(frame, 0, 0, canvas.width, canvas.height);
  if (!box) return;
  const across = canvas.width / props.value.width;
  const down = canvas.height / props.value.height;
  const sides = [box[0] * across, box[1] * down, (box[2] - box[0]) * across, (box[3] - box[1]) * down];
  for (const [colour, width] of [
    ["rgba(12, 12, 16, 0.9)", 6],
    ["#fff", 3],
  ]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(...sides);
  }
}

function spot(event) {
  const place = canvas.getBoundingClientRect();
  const share = (at, low, size) => Math.min(1, Math.max(0, (at - low) / size));
  return [
    Math.round(share(event.clientX, place.left, place.width) * props.value.width),
    Math.round(share(event.clientY, place.top, place.height) * props.value.height),
  ];
}

async function show() {
  const value = props.value;
  root.hidden = !value || !value.frame;
  if (root.hidden) return;
  box = value.box || null;
  const image = new Image();
  image.src = value.frame;
  await image.decode();
  frame = image;
  canvas.width = image.width;
  canvas.height = image.height;
  draw();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  from = spot(event);
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (!from) return;
  const [x, y] = spot(event);
  box = [Math.min(x, from[0]), Math.min(y, from[1]), Math.max(x, from[0]), Math.max(y, from[1])];
  draw();
});
canvas.addEventListener("pointerup", () => {
  from = null;
  if (box && box[2] - box[0] > 3 && box[3] - box[1] > 3) trigger("select", { box: box.join(", ") });
});
canvas.addEventListener("pointercancel", () => (from = null));
watch("value", show);
show();
