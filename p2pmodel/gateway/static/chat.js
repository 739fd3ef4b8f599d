import { element } from "./parts.js";

const at = (id) => document.getElementById(id);
const conversation = [];
let models = [];
let running = null;
let key = sessionStorage.getItem("key") || "";

const headers = () => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });
const chosen = () => models.find((model) => model.id === at("model").value);
const say = (text) => { at("state").textContent = text; };

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The gateway answered with status ${response.status}.`;
  }
}

async function load() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    return say("The gateway cannot be reached.");
  }
  at("key-form").hidden = response.status !== 401;
  if (response.status === 401) return at("key").focus();
  if (!response.ok) return say(await failure(response));
  models = (await response.json()).data;
  at("model").replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id + (model.available ? "" : " (not served)"))));
  explain();
  say("");
}

function explain() {
  const chat = chosen()?.chat;
  at("hint").textContent = chat ? "" : "This model has no chat template: what you write is continued, not answered.";
  at("prompt-label").textContent = chat ? "Message" : "Text to continue";
  at("prompt").placeholder = chat ? "Write a message" : "def read_lines(path):";
  at("send").textContent = chat ? "Send" : "Continue";
}

function turn(name, kind, ...content) {
  const text = element("p", {}, content);
  const node = element("article", { class: `turn ${kind}` }, element("h2", {}, name), element("div", {}, text));
  at("turns").append(node);
  node.scrollIntoView({ block: "nearest" });
  return { node, text };
}

function request(prompt) {
  const body = { model: at("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (at(name).value !== "") body[name] = Number(at(name).value);
  return chosen()?.chat ? { ...body, messages: [...conversation, { role: "user", content: prompt }] } : { ...body, prompt };
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
  }
}

async function ask(prompt) {
  const chat = chosen()?.chat;
  if (chat) turn("You", "", prompt);
  const { node, text } = chat ? turn("Model", "") : turn("Text", "completion", element("span", { class: "given" }, prompt));
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  say("The model writes …");
  let answer = "";
  let usage = null;
  const began = performance.now();
  try {
    const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(request(prompt)), signal: running.signal });
    if (response.status === 401) at("key-form").hidden = false;
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      const piece = chunk.choices[0] ? (chat ? chunk.choices[0].delta.content : chunk.choices[0].text) : "";
      if (!piece) continue;
      answer += piece;
      const low = innerHeight + scrollY >= document.body.scrollHeight - 80;
      text.append(piece);
      if (low) scrollTo(0, document.body.scrollHeight);
    }
    if (chat) conversation.push({ role: "user", content: prompt }, { role: "assistant", content: answer });
    const seconds = (performance.now() - began) / 1000;
    if (usage) node.lastChild.append(element("small", {}, `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(1)} a second`));
    say("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else {
      turn("Error", "failed", error.message);
      say("The answer failed.");
    }
  } finally {
    running = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    at("prompt").focus();
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = at("prompt").value;
  if (running || !prompt.trim()) return;
  at("prompt").value = "";
  ask(prompt);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  at("turns").replaceChildren();
  say("");
  at("prompt").focus();
});
at("model").addEventListener("change", explain);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  sessionStorage.setItem("key", key);
  load();
});
load();
