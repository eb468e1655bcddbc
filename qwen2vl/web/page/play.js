// The agent on the screen game, step by step.
import { count, follow, make, post, the, waiting } from "./server.js";

const LEVELS = ["two buttons", "three or four buttons", "two taps in order", "a menu, then a button", "type, then a button"];
const ENDS = {
  answered: "the model wrote without acting",
  "step limit": "the model took too many steps",
  "error limit": "too many calls could not be carried out",
  "context limit": "the context is full",
};
let over = true;
let busy = false;
let running = false; // to the end
let screen = null; // before the step that comes next

export function startPlay(about, settings) {
  the("level").append(...about.levels.map((level) => make("option", { value: level, textContent: LEVELS[level] ?? level })));
  the("new-game").onsubmit = (event) => {
    event.preventDefault();
    newGame(settings).catch(complain);
  };
  the("step").onclick = step;
  the("to-end").onclick = async () => {
    running = true;
    while (running && !over) await step();
    running = false;
    changed();
  };
  the("stop-step").onclick = () => {
    running = false;
    post("stop").catch(complain);
  };
  changed();
}

function complain(error) {
  running = false;
  the("play-problem").replaceChildren(make("p", { className: "problem", role: "alert", textContent: error.message }));
}

function changed() {
  the("step").disabled = the("to-end").disabled = busy || running || over;
  the("stop-step").disabled = !busy;
  the("new-game").querySelector("button").disabled = busy || running;
}

function showScreen(address) {
  screen = address;
  the("screen").src = address;
  the("screen").hidden = false;
  the("screen-none").hidden = true;
}

async function newGame(settings) {
  the("play-problem").replaceChildren();
  const wanted = { level: Number(the("level").value), language: the("language").value, seed: Number(the("game-seed").value) };
  const game = await post("game", { ...wanted, settings: settings() });
  over = false;
  the("task").textContent = `Task: ${game.instruction}`;
  the("task").hidden = false;
  the("steps").replaceChildren();
  the("play-status").textContent = "";
  showScreen(game.screen);
  changed();
}

async function step() {
  const words = make("p", { className: "words" });
  const before = make("div", { className: "canvas small" }, make("img", { src: screen, alt: "the screen before this step" }));
  const below = make("small");
  const entry = make("li", { className: "step" }, before, make("div", {}, words, below));
  the("steps").append(entry);
  the("play-problem").replaceChildren();
  busy = true;
  changed();
  let done = false;
  try {
    await follow("step", {}, (event) => {
      if (event.event === "text") words.append(event.text);
      else if (event.event === "waiting") the("play-status").textContent = waiting(event.ahead);
      else if (event.event === "step") {
        done = true;
        show(event, words, below, before);
      }
    });
  } catch (error) {
    complain(error);
  } finally {
    if (!done) {
      entry.remove(); // a step that was stopped has not happened
      running = false;
    }
    busy = false;
    changed();
  }
}

function show(event, words, below, before) {
  words.textContent = event.text;
  below.textContent = event.error || event.calls.map((call) => `${call.name} ${JSON.stringify(call.arguments)}`).join("; ");
  if (event.error) below.className = "wrong";
  for (const [x, y] of event.taps) {
    const tap = make("span", { className: "tap" });
    Object.assign(tap.style, { left: `${x / 10}%`, top: `${y / 10}%` });
    before.append(tap);
  }
  showScreen(event.screen);
  over = event.outcome !== null;
  const said = event.success ? "won" : event.outcome === "done" ? "lost: that was not the next thing to do" : (ENDS[event.outcome] ?? "");
  the("play-status").textContent = over ? `After ${count(event.steps, "step")}: ${said}.` : `${event.steps} done`;
}
