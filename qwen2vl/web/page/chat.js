// The conversation: what is attached, asked and answered, the places of an answer, and what the model sees.
import { count, follow, make, path, post, request, the, waiting } from "./server.js";

const COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000"];
const ENDS = { length: "cut at the longest answer", context: "cut: the context is full", stopped: "stopped" };
const attached = new Map(); // number -> what the server says of it
const unsent = []; // numbers that wait for the next question
let viewed = null; // the number that is shown under "What the model sees"
let reading = 0; // files that are being uploaded and read
let busy = false;

export function startChat(about, settings) {
  the("named").hidden = !about.named.length;
  the("source").placeholder = about.named.map((kind) => ({ remote: "https://...", local: "/path/on/the/server" })[kind]).join(" or ");
  the("add-source").onclick = () => {
    const source = the("source").value.trim();
    if (source) attach(source, () => post("name", { source })).then((good) => good && (the("source").value = ""));
  };
  the("files").onchange = () => {
    upload(the("files").files, about);
    the("files").value = "";
  };
  for (const name of ["dragover", "drop"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault(); // else the browser would leave the page for the file
      document.body.classList.toggle("dropping", name === "dragover");
      if (name === "drop") upload(event.dataTransfer.files, about);
    });
  }
  addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  addEventListener("paste", (event) => event.clipboardData.files.length && upload(event.clipboardData.files, about));
  the("composer").onsubmit = (event) => {
    event.preventDefault();
    ask(settings);
  };
  the("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      the("composer").requestSubmit();
    }
  };
  the("stop").onclick = () => post("stop").catch(complain);
  the("clear").onclick = () => clear().catch(complain);
  the("seen-parts").onchange = showSeen;
  if (the("files").files.length) the("files").onchange(); // chosen before the page was ready
}

/** An error in its place among the turns. It ends nothing. */
function complain(error) {
  the("turns").append(make("li", { className: "problem", role: "alert", textContent: error.message }));
  scroll();
}

/** Show the end of the turns; while an answer is written, only to who has not scrolled up to read. */
function scroll(always = true) {
  const turns = the("turns");
  if (always || turns.scrollHeight - turns.scrollTop - turns.clientHeight < 100) turns.scrollTop = turns.scrollHeight;
}

function changed() {
  const status = reading ? `reading ${count(reading, "file")} ...` : busy ? "answering ..." : "";
  the("status").textContent = status;
  the("send").disabled = busy || reading > 0;
  the("clear").disabled = busy || reading > 0;
  the("stop").disabled = !busy;
}

// ----------------------------------------------------------------------------------------------------- attachments

async function upload(files, about) {
  for (const file of [...files]) {
    await attach(file.name, () => {
      if (file.size > about.max_upload) throw new Error(`${file.name} has more than the ${about.max_upload >> 20} MiB of an upload`);
      const address = `${path("upload")}?name=${encodeURIComponent(file.name)}`;
      return request(address, { method: "POST", body: file, headers: { "content-type": file.type || "application/octet-stream" } });
    });
  }
}

async function attach(name, send) {
  reading += 1;
  changed();
  try {
    const facts = await send();
    attached.set(facts.number, facts);
    unsent.push(facts.number);
    viewed = facts.number;
    for (const note of facts.notes) complain(new Error(note));
    return true;
  } catch (error) {
    complain(error);
    return false;
  } finally {
    reading -= 1;
    changed();
    showAttached();
  }
}

async function drop(number) {
  await post("drop", { number });
  unsent.splice(unsent.indexOf(number), 1);
  attached.delete(number);
  if (viewed === number) viewed = [...attached.keys()].at(-1) ?? null;
  showAttached();
}

function pictureOf(number, view = "picture") {
  return path("media", number, view);
}

function thumbnail(number) {
  const { name, kind, tokens } = attached.get(number);
  const image = make("img", { src: pictureOf(number), alt: name });
  image.onclick = () => {
    viewed = number;
    showSeen();
  };
  return [image, make("span", {}, make("b", { textContent: name }), `${kind === "video" ? "clip" : "picture"}, ${count(tokens, "token")}`)];
}

function showAttached() {
  const chips = unsent.map((number) => {
    const remove = make("button", { type: "button", textContent: "×", title: "Remove", ariaLabel: `Remove ${attached.get(number).name}` });
    remove.onclick = () => drop(number).catch(complain);
    return make("li", {}, ...thumbnail(number), remove);
  });
  the("waiting").replaceChildren(...chips);
  showSeen();
}

/** How a picture is enlarged: one of few pixels shows them. */
function fine(number) {
  return Math.max(...(attached.get(number)?.resized_size ?? [0])) < 200 ? "pixels" : "";
}

function size([width, height]) {
  return `${width} × ${height}`;
}

function showSeen() {
  the("seen-none").hidden = viewed !== null;
  the("seen-one").hidden = viewed === null;
  if (viewed === null) return;
  const facts = attached.get(viewed);
  const parts = the("seen-parts").checked;
  the("seen-picture").src = pictureOf(viewed, parts ? "parts" : "picture");
  the("seen-picture").alt = facts.name;
  the("seen-picture").className = parts ? "" : fine(viewed);
  the("seen-parts").nextElementSibling.textContent = facts.kind === "video" ? "all frames" : "patches and tokens";
  const [t, rows, columns] = facts.grid;
  const lines = [["file", facts.name], ["size", `${size(facts.source_size)} pixels`]];
  if (facts.kind === "video") {
    const times = facts.frame_times.map((time) => time.toFixed(2));
    const shown = times.length <= 12 ? times : [...times.slice(0, 6), "...", ...times.slice(-3)];
    lines.push(["duration", `${facts.duration.toFixed(2)} s at ${facts.fps.toFixed(2)} frames per second`]);
    lines.push(["frames kept", `${times.length}, at ${shown.join(", ")} s`]);
  }
  lines.push(["resized to", `${size(facts.resized_size)} pixels`]);
  lines.push(["grid", `${t} × ${rows} × ${columns} (time × rows × columns) = ${facts.patches} patches`]);
  lines.push(["tokens", `${facts.tokens}, and 2 marks`]);
  the("seen-facts").replaceChildren(...lines.flatMap(([name, text]) => [make("dt", { textContent: name }), make("dd", { textContent: text })]));
  const choices = [...attached.keys()].map((number) => {
    const choose = make("button", { type: "button", textContent: number, title: attached.get(number).name });
    choose.setAttribute("aria-pressed", String(number === viewed));
    choose.onclick = () => {
      viewed = number;
      showSeen();
    };
    return make("li", {}, choose);
  });
  the("seen-list").replaceChildren(...(choices.length > 1 ? choices : []));
}

// -------------------------------------------------------------------------------------------------------- questions

async function ask(settings) {
  const text = the("question").value;
  if (busy || reading || !text.trim()) return;
  const media = [...unsent];
  const said = make("p", { textContent: text });
  const pictures = make("ul", { className: "pictures" }, ...media.map((number) => make("li", {}, ...thumbnail(number))));
  const question = make("li", { className: "question" }, pictures, said);
  const words = make("p", { className: "words" });
  const below = make("div", { className: "below" });
  const answer = make("li", { className: "answer" }, words, below);
  the("turns").append(question, answer);
  let kept = false;
  busy = true;
  changed();
  scroll();
  try {
    const system = the("settings").querySelector("[name=system]").value;
    await follow("ask", { text, media, system, settings: settings() }, (event) => {
      if (event.event === "text") words.append(event.text);
      else if (event.event === "waiting") below.textContent = waiting(event.ahead);
      else if (event.event === "prompt") below.textContent = `reading ${count(event.tokens, "token")} ...`;
      else if (event.event === "answer") {
        kept = true;
        words.textContent = event.text;
        below.replaceChildren(...(event.places.length ? [drawn(event)] : []), make("small", { textContent: told(event) }));
      }
      scroll(event.event === "answer");
    });
    if (kept) {
      unsent.splice(0, media.length);
      the("question").value = "";
    } else {
      question.remove();
      answer.remove();
    }
  } catch (error) {
    // What cannot be answered stays in the composer, to be asked otherwise.
    question.remove();
    answer.remove();
    complain(error);
  } finally {
    busy = false;
    changed();
    showAttached();
  }
}

function told(event) {
  const parts = [ENDS[event.finish], count(event.new_tokens, "token")];
  if (event.prompt_tokens) {
    const again = event.cached_tokens ? `, ${event.cached_tokens} of them kept` : "";
    parts.push(`after ${event.prompt_tokens}${again}`, `first after ${event.first_token.toFixed(2)} s`);
    if (event.tokens_per_s) parts.push(`then ${event.tokens_per_s.toFixed(1)} tokens/s`);
  }
  return parts.filter((part) => part).join(" · ");
}

async function clear() {
  await post("clear");
  attached.clear();
  unsent.length = 0;
  viewed = null;
  the("turns").replaceChildren();
  showAttached();
}

// ------------------------------------------------------------------------------------------------------------ places

/** The places of an answer over the picture that it is about. With several pictures it does not say which: the latest is
 * shown, and any other may be chosen. */
function drawn(event) {
  const numbers = [...new Set(event.shown)];
  const figure = make("figure", { className: "places" });
  const canvas = make("div", { className: "canvas" });
  const choices = make("div", { className: "choices" });
  const labels = event.places.map((place) => place.label);
  const colour = (place, n) => COLOURS[(place.label === null ? n : labels.indexOf(place.label)) % COLOURS.length];

  function on(number) {
    const image = make("img", { src: pictureOf(number), alt: attached.get(number)?.name ?? "", className: fine(number) });
    const [width, height] = attached.get(number)?.resized_size ?? [1, 1];
    Object.assign(image, { width, height }); // so that there is room for it before it has come
    canvas.style.maxWidth = `${26 * Math.min(1, width / height)}rem`;
    const marks = event.places.flatMap((place, n) => {
      const [points, left, top] = [corners(place), Math.min(...place.points.map((p) => p[0])), Math.min(...place.points.map((p) => p[1]))];
      const shape = svg("polygon", { points: points.map((p) => p.join(",")).join(" "), stroke: colour(place, n) });
      if (place.label === null) return [[shape, null]];
      const label = make("span", { className: "label", textContent: place.label });
      Object.assign(label.style, { left: `${left / 10}%`, top: `${top / 10}%`, background: colour(place, n) });
      if (top < 80) label.classList.add("inside");
      return [[shape, label]];
    });
    const layer = svg("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none" });
    layer.append(...marks.map(([shape]) => shape));
    canvas.replaceChildren(image, layer, ...marks.map(([, label]) => label).filter((label) => label));
    const buttons = numbers.map((other) => {
      const choose = make("button", { type: "button", textContent: other, title: attached.get(other)?.name ?? "" });
      choose.setAttribute("aria-pressed", String(other === number));
      choose.onclick = () => on(other);
      return choose;
    });
    choices.replaceChildren(...(buttons.length > 1 ? ["drawn on picture ", ...buttons] : []));
  }

  if (numbers.length) on(numbers.at(-1));
  const list = event.places.map((place, n) => {
    const corners = (place.pixels ?? place.points).map((point) => `(${point.join(", ")})`).join(" ");
    const name = make("b", { textContent: place.label ?? place.kind });
    name.style.color = colour(place, n);
    return make("li", {}, name, ` ${corners} ${place.pixels ? "pixels of the file" : "thousandths"}`);
  });
  // An answer may speak of places where nothing is attached.
  figure.append(...(numbers.length ? [canvas, choices] : []), make("ul", {}, ...list));
  return figure;
}

function corners({ kind, points }) {
  if (kind === "quad") return points;
  const [[left, top], [right, bottom]] = points;
  return [[left, top], [right, top], [right, bottom], [left, bottom]];
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
