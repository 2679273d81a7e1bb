// The viewer of explanations: draws one or two of them over their photo, and lets people ask.
// Runs in Gradio's HTML component, which gives `element`, `props` and `watch`.

const root = element.querySelector(".hysm");
const find = (name) => root.querySelector(`[data-part="${name}"]`);
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

const INK = "rgba(12, 12, 16, 0.9)";
const PATH = "#56b4e9"; // sky blue of Okabe and Ito: told from the reds and yellows by all eyes
const SECONDS = 0.7; // that a stage takes when it plays
const REACH = 18; // how far beside a point a click may be, in CSS pixels

let colours = [];
let panes = [];
let shows = { points: true, attention: true, saliency: false, boxes: false };
let at = 0; // where on the way: 0 is the class, then the stages; the last one is the pixels
let playing = 0; // the handle of the next frame
let region = null; // in shares of the photo: x0, y0, x1, y1
let drag = null;
let seen = null; // the value that is shown

// -- small things ------------------------------------------------------------------------------

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function percent(share) {
  if (share === null || share === undefined) return "";
  if (share > 0 && share < 0.001) return "<0.1 %";
  if (share > 0.999 && share < 1) return ">99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

// With two digits, however little it is: that of a single node is.
function fine(share) {
  const hundredths = 100 * share;
  if (!hundredths) return "0 %";
  const digits = clamp(1 - Math.floor(Math.log10(Math.abs(hundredths))), 0, 6);
  return `${hundredths.toFixed(digits)} %`;
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function picture(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("A picture could not be shown; load the page again."));
    image.src = source;
  });
}

function canvasOf(width, height) {
  const made = document.createElement("canvas");
  made.width = width;
  made.height = height;
  return made;
}

function say(sentence) {
  const line = find("said");
  line.textContent = sentence;
  line.hidden = !sentence;
}

// A grey map becomes colours that let the photo through where it is weak, or a veil with holes in it.
function paint(image, how) {
  const made = canvasOf(image.width, image.height);
  const pen = made.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, made.width, made.height);
  const data = pixels.data;
  for (let i = 0; i < data.length; i += 4) {
    const level = data[i];
    const [r, g, b, a] = how(level / 255, level);
    data[i] = r;
    data[i + 1] = g;
    data[i + 2] = b;
    data[i + 3] = a;
  }
  pen.putImageData(pixels, 0, 0);
  return made;
}

const heat = (share, level) => [...colours[level], 210 * share ** 0.7];
// Pixels above 0.1 are all but the weakest tenth of what counts: they stay as they are.
const veil = (share) => [14, 14, 20, 205 * (1 - clamp((share - 0.04) / 0.1, 0, 1))];

// -- scenes ------------------------------------------------------------------------------------

async function load(scene) {
  const [photo, attention, saliency, ...maps] = await Promise.all(
    [scene.photo, scene.attention, scene.saliency, ...scene.stages.map((one) => one.map)].map(picture)
  );
  const single = (stage) => stage.shape[1] * stage.shape[2] === 1;
  return {
    scene,
    photo,
    attention: paint(attention, heat),
    saliency: paint(saliency, veil),
    stages: maps.map((map, i) =>
      paint(map, single(scene.stages[i]) ? (share, level) => [...colours[level], 60 * share] : heat)
    ),
    path: null,
    node: null,
    asked: 0,
  };
}

async function show(value) {
  if (value && value.said) {
    say(value.said); // a failure: what was shown stays
    return;
  }
  if (!value || !value.scenes || !value.scenes.length) return;
  seen = value;
  colours = value.palette;
  root.setAttribute("aria-busy", "true");
  try {
    const loaded = await Promise.all(value.scenes.map(load));
    if (seen !== value) return; // another one came meanwhile
    stop();
    panes = loaded;
    region = null;
    build();
    at = last();
    update();
    say("");
  } catch (error) {
    say(error.message);
  }
  root.setAttribute("aria-busy", "false");
}

const last = () => panes[0].scene.stages.length;

// The same share of the way in the second pane, whose network may have other stages.
function place(pane) {
  const own = pane.scene.stages.length;
  return own === last() ? at : (at / last()) * own;
}

function build() {
  const holder = find("panes");
  holder.replaceChildren();
  find("infos").replaceChildren();
  find("links").replaceChildren();
  const alike = panes.every((pane) => pane.scene.label === panes[0].scene.label);
  for (const [number, pane] of panes.entries()) {
    const scene = pane.scene;
    const frame = make("figure", "pane");
    const head = make("figcaption", "head");
    head.append(make("strong", "", scene.label || `class ${scene.index}`));
    if (scene.probability !== null) head.append(make("span", "chance", percent(scene.probability)));
    head.append(make("span", "model", scene.model));
    pane.canvas = make("canvas", "view");
    pane.canvas.tabIndex = 0;
    pane.canvas.setAttribute("role", "img");
    pane.canvas.style.setProperty("--aspect", scene.width / scene.height);
    pane.info = make("div", "info");
    find("infos").append(pane.info);
    frame.append(head, pane.canvas);
    holder.append(frame);
    listen(pane);
    const links = make("span", "link-group");
    if (panes.length > 1) links.append(make("span", "whose", `${alike ? scene.model : scene.label}:`));
    for (const [text, file] of [
      ["Picture", "explanation.png"],
      ["Numbers", "explanation.json"],
      ["All (ZIP)", "explanation.zip"],
    ]) {
      const link = make("a", "button", text);
      link.href = new URL(`page/${scene.key}/${file}`, here());
      link.download = file.replace("explanation", slug(scene.label) || `explanation-${number + 1}`);
      links.append(link);
    }
    find("links").append(links);
  }
  holder.dataset.count = find("infos").dataset.count = panes.length;
  const slider = find("slider");
  slider.max = last();
  film();
  observer.disconnect();
  for (const pane of panes) observer.observe(pane.canvas);
}

const here = () => window.location.href.replace(/[?#].*$/, "").replace(/\/?$/, "/");
const slug = (text) => (text || "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);

// The strip of stages under the slider.
function film() {
  const strip = find("film");
  strip.replaceChildren();
  const pane = panes[0];
  const names = ["class", ...pane.scene.stages.map((stage) => stage.name)];
  names.forEach((name, i) => {
    const frame = make("button", "frame");
    frame.type = "button";
    frame.tabIndex = -1; // the slider does the same with the keyboard
    frame.title = name;
    const wide = 132;
    const small = canvasOf(wide, Math.round(clamp(wide / (pane.scene.width / pane.scene.height), 60, 176)));
    const pen = small.getContext("2d");
    ground(pen, pane, small.width, small.height, 0.55);
    if (i === 0) {
      pen.fillStyle = "rgba(14, 14, 20, 0.6)";
      pen.fillRect(0, 0, small.width, small.height);
      pen.fillStyle = "#fff";
      pen.font = `600 ${Math.round(wide / 8)}px system-ui, sans-serif`;
      pen.textAlign = "center";
      pen.fillText("class", wide / 2, small.height / 2 + wide / 24);
    } else {
      const [across, down] = [small.width / pane.scene.width, small.height / pane.scene.height];
      if (i < last()) drawStage(pen, pane, i - 1, across, down);
      else drawPoints(pen, pane, across, down, 1);
    }
    frame.append(small);
    frame.addEventListener("click", () => {
      stop();
      go(i);
    });
    strip.append(frame);
  });
}

// -- drawing -----------------------------------------------------------------------------------

function ground(pen, pane, width, height, mute) {
  pen.imageSmoothingQuality = "high";
  pen.drawImage(pane.photo, 0, 0, width, height);
  if (!mute) return;
  pen.save();
  pen.globalCompositeOperation = "saturation";
  pen.fillStyle = `rgba(128, 128, 128, ${mute})`;
  pen.fillRect(0, 0, width, height);
  pen.restore();
  pen.fillStyle = `rgba(14, 14, 20, ${0.35 * mute})`;
  pen.fillRect(0, 0, width, height);
}

function drawStage(pen, pane, number, across, down) {
  const [left, top, right, bottom] = pane.scene.stages[number].box;
  pen.drawImage(
    pane.stages[number],
    left * across,
    top * down,
    (right - left) * across,
    (bottom - top) * down
  );
}

function dot(pen, x, y, radius, fill, rim) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fillStyle = fill;
  pen.fill();
  if (rim) {
    pen.strokeStyle = rim;
    pen.stroke();
  }
}

function drawPoints(pen, pane, across, down, unit) {
  const points = pane.scene.points;
  const size = unit * clamp(26 / Math.sqrt(Math.max(points.length, 1)), 1.6, 5);
  pen.lineWidth = 0.7 * unit;
  for (let i = points.length - 1; i >= 0; i--) {
    const [x, y, level] = points[i];
    const rise = Math.sqrt(level);
    const [r, g, b] = colours[Math.round(255 * (0.35 + 0.65 * rise))];
    dot(
      pen,
      (x + 0.5) * across,
      (y + 0.5) * down,
      size * (0.4 + 0.9 * rise),
      `rgba(${r}, ${g}, ${b}, ${0.45 + 0.55 * rise})`,
      `rgba(10, 10, 14, ${0.65 * rise})`
    );
  }
}

function drawBoxes(pen, pane, across, down, unit) {
  pen.font = `600 ${13 * unit}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const { box, label, score } of pane.scene.boxes) {
    const [x0, y0, x1, y1] = [box[0] * across, box[1] * down, box[2] * across, box[3] * down];
    pen.strokeStyle = INK;
    pen.lineWidth = 5 * unit;
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    pen.strokeStyle = "#fff";
    pen.lineWidth = 2.5 * unit;
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    const text = `${label} ${percent(score)}`;
    const wide = pen.measureText(text).width + 12 * unit;
    const tall = 21 * unit;
    const left = clamp(x0, 0, Math.max(0, pen.canvas.width - wide));
    const over = y0 >= tall ? y0 - tall : y0;
    pen.fillStyle = "#fff";
    pen.fillRect(left, over, wide, tall);
    pen.fillStyle = "#1c1c20";
    pen.fillText(text, left + 6 * unit, over + tall / 2 + unit);
  }
}

function drawPath(pen, pane, across, down, unit) {
  const nodes = pane.path.nodes;
  const spots = nodes.map((node) => [(node.x + 0.5) * across, (node.y + 0.5) * down]);
  for (const [width, colour] of [
    [5, INK],
    [2.5, PATH],
  ]) {
    pen.beginPath();
    spots.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.strokeStyle = colour;
    pen.lineWidth = width * unit;
    pen.lineJoin = "round";
    pen.stroke();
  }
  const now = Math.round(place(pane)) - 1;
  pen.lineWidth = 1.5 * unit;
  nodes.forEach((node, i) => {
    const here = node.stage === now;
    const end = i === nodes.length - 1;
    dot(pen, ...spots[i], (here || end ? 6.5 : 3) * unit, here || end ? "#fff" : PATH, INK);
  });
}

function drawNodes(pen, pane, number, across, down, unit) {
  const stage = pane.scene.stages[number];
  if (stage.shape[1] * stage.shape[2] === 1) return; // it is nowhere in particular
  pen.lineWidth = unit;
  for (const node of stage.nodes) {
    const chosen = node === pane.node;
    dot(pen, (node[0] + 0.5) * across, (node[1] + 0.5) * down, (chosen ? 6.5 : 3.5) * unit, chosen ? PATH : "#fff", INK);
  }
}

function draw(pane) {
  const canvas = pane.canvas;
  const width = canvas.clientWidth;
  if (!width) return; // in a tab that isn't shown
  const unit = Math.min(2, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * unit);
  canvas.height = Math.round((canvas.width * pane.scene.height) / pane.scene.width);
  const pen = canvas.getContext("2d");
  const across = canvas.width / pane.scene.width;
  const down = canvas.height / pane.scene.height;
  const spot = place(pane);
  const end = pane.scene.stages.length;
  if (spot >= end) {
    const muted = shows.points || shows.attention;
    ground(pen, pane, canvas.width, canvas.height, muted ? (shows.points ? 0.85 : 0.6) : 0);
    if (shows.saliency) pen.drawImage(pane.saliency, 0, 0, canvas.width, canvas.height);
    if (shows.attention) pen.drawImage(pane.attention, 0, 0, canvas.width, canvas.height);
    if (shows.points) drawPoints(pen, pane, across, down, unit);
    if (shows.boxes) drawBoxes(pen, pane, across, down, unit);
  } else {
    ground(pen, pane, canvas.width, canvas.height, 0.75);
    const low = Math.floor(spot);
    const part = spot - low;
    for (const [number, share] of [
      [low, 1 - part],
      [low + 1, part],
    ]) {
      if (share <= 0 || number > end) continue;
      pen.globalAlpha = share;
      if (number === 0) drawClass(pen, pane, unit);
      else {
        drawStage(pen, pane, number - 1, across, down);
        if (number < end) drawNodes(pen, pane, number - 1, across, down, unit);
        else drawPoints(pen, pane, across, down, unit);
      }
    }
    pen.globalAlpha = 1;
  }
  if (pane.path) drawPath(pen, pane, across, down, unit);
  if (region) drawRegion(pen, unit);
}

function drawClass(pen, pane, unit) {
  const { width, height } = pen.canvas;
  pen.fillStyle = "rgba(14, 14, 20, 0.55)";
  pen.fillRect(0, 0, width, height);
  const label = pane.scene.label || `class ${pane.scene.index}`;
  let size = Math.min(34 * unit, height / 6);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `700 ${size}px system-ui, sans-serif`;
  size *= Math.min(1, (0.88 * width) / pen.measureText(label).width);
  pen.font = `700 ${size}px system-ui, sans-serif`;
  pen.fillStyle = "#fff";
  pen.fillText(label, width / 2, height / 2 - 0.3 * size);
  if (pane.scene.probability !== null) {
    pen.font = `400 ${0.7 * size}px system-ui, sans-serif`;
    pen.fillText(percent(pane.scene.probability), width / 2, height / 2 + 0.8 * size);
  }
  pen.textAlign = "start";
}

function drawRegion(pen, unit) {
  const { width, height } = pen.canvas;
  const [x0, y0, x1, y1] = region;
  const box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height];
  pen.strokeStyle = INK;
  pen.lineWidth = 4 * unit;
  pen.strokeRect(...box);
  pen.strokeStyle = "#fff";
  pen.lineWidth = 2 * unit;
  pen.setLineDash([7 * unit, 5 * unit]);
  pen.strokeRect(...box);
  pen.setLineDash([]);
}

// -- what is told ------------------------------------------------------------------------------

function caption() {
  const number = Math.round(at);
  const stage = panes[0].scene.stages[number - 1];
  if (number === 0) return "The class. Go on, and see where the network took it from.";
  if (number === last()) return "The pixels: where the answer comes from.";
  const [channels, height, width] = stage.shape;
  return `Stage ${number} of ${last() - 1}: ${stage.name}, ${channels} channels of ${height} × ${width}`;
}

function describe(pane) {
  const { scene } = pane;
  const parts = Object.keys(shows).filter((name) => shows[name]);
  const what = at >= last() ? parts.join(", ") || "nothing else" : caption();
  return (
    `Photo with ${what}. ${scene.label} ${percent(scene.probability)}, by ${scene.model}. ` +
    "Arrow keys go from point to point, R asks about a region, Escape ends both."
  );
}

function bars(rows) {
  const list = make("ol", "bars");
  const most = Math.max(...rows.map((row) => row.share), 1e-9);
  for (const { label, share, strong } of rows) {
    const row = make("li", strong ? "strong" : "");
    row.append(make("span", "name", label));
    const line = make("span", "line");
    const bar = make("span", "bar");
    bar.style.width = `${(100 * share) / most}%`;
    line.append(bar);
    row.append(line, make("span", "number", percent(share)));
    list.append(row);
  }
  return list;
}

// How much of the evidence for a class lies in the region; cells that it cuts count by their part.
function inRegion(grid, side) {
  const [x0, y0, x1, y1] = region.map((value) => value * side);
  let held = 0;
  for (let row = Math.floor(y0); row < Math.min(side, Math.ceil(y1)); row++) {
    const tall = Math.min(row + 1, y1) - Math.max(row, y0);
    for (let column = Math.floor(x0); column < Math.min(side, Math.ceil(x1)); column++) {
      const wide = Math.min(column + 1, x1) - Math.max(column, x0);
      held += grid[row * side + column] * tall * wide;
    }
  }
  return clamp(held / 1e6, 0, 1);
}

function tell(pane) {
  const { scene } = pane;
  pane.info.replaceChildren();
  if (region) {
    const area = (region[2] - region[0]) * (region[3] - region[1]);
    pane.info.append(
      make("h3", "", "Which classes look here?"),
      make("p", "hint", `The share of each class's evidence that lies in this region, ${percent(area)} of the photo.`),
      bars(
        scene.likeliest
          .map((one) => ({
            label: `${one.label} (${percent(one.probability)})`,
            share: inRegion(one.grid, scene.grid),
            strong: one.index === scene.index,
          }))
          .sort((one, other) => other.share - one.share)
      )
    );
  }
  if (pane.node) {
    const [, , channel, share] = pane.node;
    pane.info.append(make("p", "hint", `Channel ${channel} holds ${fine(share)} of the evidence of this stage, at this one place.`));
  }
  if (pane.path) {
    const now = Math.round(place(pane)) - 1;
    const table = make("table", "path");
    const title = make("caption", "", "The path to this point");
    const names = make("tr");
    for (const name of ["stage", "channel", "evidence"]) names.append(make("th", "", name));
    const head = make("thead");
    head.append(names);
    const body = make("tbody");
    for (const node of pane.path.nodes) {
      const row = make("tr", node.stage === now ? "now" : "");
      row.append(
        make("td", "", node.name),
        make("td", "", node.name === "pixels" ? ["red", "green", "blue"][node.channel] || node.channel : node.channel),
        make("td", "", fine(node.share))
      );
      body.append(row);
    }
    table.append(title, head, body);
    const roll = make("div", "roll");
    roll.tabIndex = 0;
    roll.append(table);
    pane.info.append(
      roll,
      make("p", "hint", `This pixel holds ${fine(pane.path.share)} of all the evidence. In each stage it is that of one channel at one place, as a share of the whole stage.`)
    );
  }
}

function update() {
  const number = Math.round(at);
  find("slider").value = number;
  find("slider").setAttribute("aria-valuetext", caption());
  find("caption").textContent = caption();
  find("play").setAttribute("aria-label", playing ? "Pause" : "Unroll: from the class to the pixels");
  find("play").dataset.playing = playing ? "yes" : "no";
  for (const name of Object.keys(shows)) {
    const button = find(name);
    button.setAttribute("aria-pressed", String(shows[name]));
    button.classList.toggle("paused", number !== last());
  }
  find("film")
    .querySelectorAll(".frame")
    .forEach((frame, i) => {
      const now = i === number;
      if (now && !frame.classList.contains("now")) {
        const strip = find("film");
        strip.scrollTo({ left: frame.offsetLeft - (strip.clientWidth - frame.clientWidth) / 2, behavior: calm.matches ? "auto" : "smooth" });
      }
      frame.classList.toggle("now", now);
    });
  for (const pane of panes) {
    pane.canvas.setAttribute("aria-label", describe(pane));
    draw(pane);
    tell(pane);
  }
}

// -- going through -----------------------------------------------------------------------------

function go(where) {
  at = clamp(where, 0, last());
  for (const pane of panes) pane.node = null;
  update();
}

function stop() {
  if (playing) cancelAnimationFrame(playing);
  playing = 0;
}

function play() {
  if (playing) {
    stop();
    update();
    return;
  }
  if (at >= last()) at = 0;
  let before = performance.now();
  let held = at; // where it would be if it were not held at each stage for a while
  let shown = -1;
  const step = (now) => {
    held += Math.max(0, now - before) / 1000 / SECONDS; // a frame may be dated before its request
    before = now;
    const floor = Math.floor(held);
    const part = held - floor;
    const eased = calm.matches ? 0 : clamp((part - 0.55) / 0.45, 0, 1);
    at = Math.min(last(), floor + eased * eased * (3 - 2 * eased));
    if (at >= last()) {
      at = last();
      playing = 0;
      update();
      return;
    }
    playing = requestAnimationFrame(step);
    if (Math.round(at) !== shown) {
      shown = Math.round(at);
      update();
    } else if (eased > 0) for (const pane of panes) draw(pane);
  };
  playing = requestAnimationFrame(step);
  update();
}

// -- asking ------------------------------------------------------------------------------------

async function ask(pane, point) {
  const asked = ++pane.asked;
  say("");
  pane.canvas.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(new URL(`page/${pane.scene.key}/path?point=${point}`, here()));
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.detail);
    if (asked === pane.asked) pane.path = told;
  } catch (error) {
    say(error instanceof TypeError ? "The server can't be reached; is it still running?" : error.message);
  }
  pane.canvas.setAttribute("aria-busy", "false");
  update();
}

function clear() {
  region = null;
  for (const pane of panes) {
    pane.path = pane.node = null;
    pane.asked++;
  }
  update();
}

// The nearest of some places [x, y, ...] to a spot in shares of the photo; -1 if none is near.
function nearest(pane, places, x, y) {
  const across = pane.canvas.clientWidth / pane.scene.width;
  const down = pane.canvas.clientHeight / pane.scene.height;
  let found = -1;
  let best = REACH;
  places.forEach(([px, py], i) => {
    const far = Math.hypot((px + 0.5) * across - x * pane.canvas.clientWidth, (py + 0.5) * down - y * pane.canvas.clientHeight);
    if (far < best) [best, found] = [far, i];
  });
  return found;
}

function click(pane, x, y) {
  const number = Math.round(place(pane));
  if (number < pane.scene.stages.length) {
    const stage = pane.scene.stages[number - 1];
    if (!stage) return;
    const i = nearest(pane, stage.nodes, x, y);
    pane.node = i < 0 ? null : stage.nodes[i];
    update();
    return;
  }
  const i = nearest(pane, pane.scene.points, x, y);
  if (i >= 0) ask(pane, i);
  else clear();
}

function listen(pane) {
  const canvas = pane.canvas;
  const spot = (event) => {
    const box = canvas.getBoundingClientRect();
    return [clamp((event.clientX - box.left) / box.width, 0, 1), clamp((event.clientY - box.top) / box.height, 0, 1)];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drag = { pane, from: spot(event), x: event.clientX, y: event.clientY, far: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag || drag.pane !== pane) return;
    drag.far ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 8;
    if (!drag.far) return;
    const [x, y] = spot(event);
    const [fx, fy] = drag.from;
    region = [Math.min(x, fx), Math.min(y, fy), Math.max(x, fx), Math.max(y, fy)];
    for (const one of panes) {
      draw(one);
      tell(one);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const dragged = drag;
    drag = null;
    if (dragged && dragged.pane === pane && !dragged.far) click(pane, ...spot(event));
  });
  canvas.addEventListener("pointercancel", () => {
    drag = null; // the page scrolls
  });
  canvas.addEventListener("keydown", (event) => key(event, pane));
}

function key(event, pane) {
  const points = pane.scene.points;
  const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") clear();
  else if (event.key === " ") play();
  else if (event.key.toLowerCase() === "r") {
    const node = pane.path && pane.path.nodes.at(-1);
    const [x, y] = node ? [node.x / pane.scene.width, node.y / pane.scene.height] : [0.5, 0.5];
    region = [clamp(x - 0.15, 0, 0.7), clamp(y - 0.15, 0, 0.7)];
    region.push(region[0] + 0.3, region[1] + 0.3);
    update();
  } else if (region && step) {
    const [dx, dy] = step.map((one) => one * 0.04);
    if (event.shiftKey) region = [region[0], region[1], clamp(region[2] + dx, region[0] + 0.02, 1), clamp(region[3] + dy, region[1] + 0.02, 1)];
    else {
      const mx = clamp(dx, -region[0], 1 - region[2]);
      const my = clamp(dy, -region[1], 1 - region[3]);
      region = [region[0] + mx, region[1] + my, region[2] + mx, region[3] + my];
    }
    update();
  } else if (step && points.length) {
    stop();
    at = last();
    const now = pane.path ? pane.path.point : -1;
    const by = step[0] + step[1];
    ask(pane, now < 0 ? 0 : (now + by + points.length) % points.length);
  } else return;
  event.preventDefault();
}

// -- saving ------------------------------------------------------------------------------------

function save() {
  const gap = 24;
  const sizes = panes.map((pane) => [pane.canvas.width, pane.canvas.height]);
  const head = 56;
  const whole = canvasOf(
    sizes.reduce((sum, [width]) => sum + width + gap, gap),
    Math.max(...sizes.map(([, height]) => height)) + head + gap
  );
  const pen = whole.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, whole.width, whole.height);
  let left = gap;
  panes.forEach((pane, i) => {
    pen.fillStyle = "#1c1c20";
    pen.font = "600 22px system-ui, sans-serif";
    pen.fillText(`${pane.scene.label} ${percent(pane.scene.probability)}`, left, 36, sizes[i][0]);
    pen.drawImage(pane.canvas, left, head);
    left += sizes[i][0] + gap;
  });
  whole.toBlob((blob) => {
    const link = make("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${slug(panes[0].scene.label) || "view"}-view.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }, "image/png");
}

// -- the start ---------------------------------------------------------------------------------

const observer = new ResizeObserver(() => panes.forEach(draw));

for (const name of Object.keys(shows)) {
  find(name).addEventListener("click", () => {
    stop();
    if (Math.round(at) !== last()) at = last(); // from a stage, it first goes back to the pixels
    else shows[name] = !shows[name];
    update();
  });
}
find("play").addEventListener("click", () => panes.length && play());
find("slider").addEventListener("input", (event) => {
  stop();
  go(Number(event.target.value));
});
find("save").addEventListener("click", () => panes.length && save());
watch("value", () => show(props.value));
show(props.value);
