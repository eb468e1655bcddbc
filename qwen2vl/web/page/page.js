import { begin, make, request, settings, the } from "./server.js";
import { startChat } from "./chat.js";
import { startPlay } from "./play.js";

function show(name) {
  for (const view of ["chat", "play"]) {
    the(view).hidden = view !== name;
    the(`show-${view}`).setAttribute("aria-pressed", String(view === name));
  }
}

function tell(about) {
  the("model").textContent = about.model;
  the("notice").textContent = about.notice;
  the("notice").hidden = !about.notice;
  document.title = `qwen2vl: ${about.model.split(":")[0]}`;
  for (const field of the("settings").querySelectorAll("[name]")) {
    const value = field.name === "system" ? about.system : about.settings[field.name];
    const text = Array.isArray(value) ? value.join(", ") : value;
    field.placeholder = text === null || text === undefined || text === "" ? "as the checkpoint has it" : String(text);
  }
}

try {
  const about = await request("/api/about");
  await begin();
  tell(about);
  the("show-chat").onclick = () => show("chat");
  the("show-play").onclick = () => show("play");
  startChat(about, settings);
  startPlay(about, settings);
  document.body.dataset.ready = "yes";
} catch (error) {
  document.body.prepend(make("p", { className: "problem", role: "alert", textContent: error.message }));
}
