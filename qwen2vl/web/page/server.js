// What the page says to its server. Every tab has a session of its own, which ends with it.

let key = null;
const SIGN = 60000; // milliseconds between two signs that this tab is there

/** A new session; those of other tabs are not touched. */
export async function begin() {
  key = (await request("/api/sessions", { method: "POST" })).key;
  setInterval(() => request(path("alive"), { method: "POST" }).catch(() => {}), SIGN);
  addEventListener("pagehide", () => navigator.sendBeacon(path("end")));
  // A browser may show a page again that it had put away; its session is over.
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

/** An address of this session. */
export function path(...parts) {
  return ["/api", key, ...parts].join("/");
}

/** The JSON of a reply; an Error with the server's words where it has one. */
export async function request(address, options = {}) {
  return (await reach(address, options)).json();
}

export function post(what, given = {}) {
  return request(path(what), { method: "POST", body: JSON.stringify(given) });
}

async function reach(address, options) {
  let reply;
  try {
    reply = await fetch(address, options);
  } catch {
    throw new Error("the server does not answer: is qwen2vl web still running?");
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => ({}));
  throw new Error(said.error ?? `the server replied ${reply.status} ${reply.statusText}`);
}

/** Calls `take` with every event of a reply that is written as it is made. */
export async function follow(what, given, take) {
  const reply = await reach(path(what), { method: "POST", body: JSON.stringify(given) });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  const last = ["answer", "step", "stopped", "error"];
  let rest = "";
  let ended = false;
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const event of lines.map((line) => JSON.parse(line))) {
      ended ||= last.includes(event.event);
      if (event.event === "error") throw new Error(event.message);
      take(event);
    }
  }
  if (!ended) throw new Error("the server went away in the middle: is qwen2vl web still running?");
}

/** An element with properties and children; text is text, and never markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const the = (id) => document.getElementById(id);

export function waiting(ahead) {
  return `waiting: ${ahead} ahead in the line`;
}

/** "1 token", "2 tokens". */
export function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

/** The settings as the server takes them; a field that is empty is left out. */
export function settings() {
  const given = {};
  for (const field of the("settings").querySelectorAll("[name]")) {
    if (field.name === "system") continue;
    if (field.name === "stop") {
      const texts = field.value.split("\n").filter((text) => text);
      if (texts.length) given.stop = texts;
    } else if (field.validity.badInput) {
      throw new Error(`${field.name}: wants a number`);
    } else if (field.value !== "") {
      given[field.name] = Number(field.value);
    }
  }
  return given;
}
