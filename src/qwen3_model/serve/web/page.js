// The page: what is asked, and in which order. What is shown of it: view.js.

import {Answer, compared} from "./answer.js";
import {chunks, model} from "./api.js";
import {Turn, inWords} from "./view.js";

const PLAIN = "autoregressive"; // the strategy that drafts nothing
const part = id => document.getElementById(id);
const form = part("form"), talk = part("talk"), prompt = part("prompt"), key = part("key"), intro = part("intro");
const messages = []; // of the chat so far, as the API takes them
let running = null; // the AbortController of what runs
let chosen = false; // whether somebody has said what the model is to do

form.addEventListener("submit", event => {
  event.preventDefault();
  if (running) return;
  if (prompt.value.trim()) turn(prompt.value);
  else tell(`${part("prompt-label").textContent}: there is none yet.`, "error");
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") running?.abort();
});
prompt.addEventListener("keydown", event => {
  const sends = event.ctrlKey || event.metaKey || (chats() && !event.shiftKey);
  if (event.key !== "Enter" || event.isComposing || !sends) return;
  event.preventDefault();
  form.requestSubmit();
});
part("stop").addEventListener("click", () => running.abort());
part("new").addEventListener("click", () => {
  messages.length = 0;
  talk.replaceChildren(intro);
  tell("");
  prompt.focus();
});
key.addEventListener("change", introduce);
form.elements.mode.forEach(radio => radio.addEventListener("change", () => {
  chosen = true;
  showMode();
}));
introduce();

/** Say what is served, and let the model do what it is for, unless somebody has said what. */
async function introduce() {
  try {
    const card = await model(key.value);
    part("model").textContent = `${card.id} · ${card.max_model_len} tokens of context`;
    if (!chosen) form.elements.mode.value = card.converses ? "chat" : "text";
    chosen = true;
    if (!running) tell("");
  } catch (error) {
    fail(error);
  }
  showMode();
}

function chats() {
  return form.elements.mode.value === "chat";
}

function showMode() {
  const label = chats() ? "Message" : "Text to continue";
  part("prompt-label").textContent = label;
  form.classList.toggle("code", !chats());
  prompt.placeholder = chats() ? label : `${label}, such as: def fibonacci(n):`;
  const sends = chats() ? "Enter sends, Shift+Enter begins a line" : "Ctrl+Enter sends";
  part("prompt-hint").textContent = `${sends}, Esc stops.`;
}

/** Ask, then plainly if that is wanted, and show both. */
async function turn(text) {
  const chat = chats(), said = {role: "user", content: text}, compares = part("compare").checked;
  const strategy = part("strategy").value;
  const asked = {chat, fields: settings(chat ? {messages: [...messages, said]} : {prompt: text}), seed: typed("seed")};
  const shown = new Turn(talk, chat ? text : null);
  const ask = (strategy, title) => answered({...asked, strategy}, shown.column(title, chat ? null : text));

  intro.remove();
  begin();
  prompt.value = "";
  tell("Answering.");
  const {answer, error} = await ask(strategy, strategy === PLAIN ? "Plain decoding" : `With drafts (${strategy})`);
  if (chat && answer.runs) messages.push(said, {role: "assistant", content: answer.content});
  if (!answer.runs) {
    shown.element.remove();
    prompt.value ||= text;
  }
  if (error) {
    fail(error);
  } else if (!compares) {
    tell(`Answered: ${inWords(answer)}.`);
  } else {
    tell(`Answered: ${inWords(answer)}. The same is decoded plainly now.`);
    asked.seed ||= answer.seedText;
    compare(shown, answer, await ask(PLAIN, "Plain decoding, the same request"));
  }
  end();
}

/** Send a request; the answer, or what has come of it, and the error that has ended it. */
async function answered({chat, fields, seed, strategy}, column) {
  const answer = new Answer(seed);
  try {
    const body = withSeed({...fields, strategy}, seed);
    const path = chat ? "v1/chat/completions" : "v1/completions";
    for await (const chunk of chunks(path, body, key.value, running.signal)) column.add(answer.push(chunk), answer);
    return {answer, error: null};
  } catch (error) {
    return {answer, error};
  } finally {
    column.end();
  }
}

/** Say whether two answers are the same. */
function compare(shown, drafted, {answer: plain, error}) {
  if (error && !(stopped(error) && plain.runs)) {
    shown.verdict("none", `Not compared: ${line(error)}`);
    return fail(error);
  }
  const {same, line: found} = compared(drafted, plain);
  const [fast, slow] = [drafted.tokensPerSecond, plain.tokensPerSecond];
  const speed = same && fast && slow ? ` With drafts: ${(fast / slow).toFixed(2)} times the tokens/s of plain decoding.` : "";
  shown.verdict(same ? "same" : "parts", found + speed);
  tell(found + speed, "unseen"); // it stands beside the answers
}

/** The fields of a request. A setting that is no number goes as it was typed: the server says what is wrong. */
function settings(what) {
  const found = {...what, stream: true, stream_options: {include_runs: true}};
  for (const [name, id] of [["temperature", "temperature"], ["max_tokens", "most"]]) {
    const value = typed(id);
    if (value) found[name] = Number.isNaN(Number(value)) ? value : Number(value);
  }
  return found;
}

function typed(id) {
  return part(id).value.trim();
}

/** JSON with a seed. Its digits are kept as they are: a number of JavaScript holds 53 bits, and a seed 64. */
function withSeed(fields, seed) {
  if (!/^(0|[1-9][0-9]*)$/.test(seed)) return JSON.stringify(seed ? {...fields, seed} : fields);
  return `${JSON.stringify(fields).slice(0, -1)}, "seed": ${seed}}`;
}

function begin() {
  running = new AbortController();
  const hadFocus = document.activeElement === part("send");
  part("send").hidden = part("new").disabled = true;
  part("stop").hidden = false;
  if (hadFocus) part("stop").focus();
}

function end() {
  running = null;
  const hadFocus = document.activeElement === part("stop");
  part("send").hidden = part("new").disabled = false;
  part("stop").hidden = true;
  if (hadFocus) prompt.focus();
}

/** Say how things stand, to those who listen too. The answers themselves are not read out as they come. */
function tell(text, look = "") {
  part("status").textContent = text;
  part("status").className = look;
}

function fail(error) {
  tell(line(error), stopped(error) ? "" : "error");
  if (error.status === 401) {
    part("key-row").hidden = false;
    key.focus();
  }
}

function stopped(error) {
  return error.name === "AbortError";
}

function line(error) {
  return stopped(error) ? "Stopped." : error.message;
}
