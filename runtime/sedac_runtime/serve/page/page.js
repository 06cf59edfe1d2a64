// Chat with a bundle: each token shows the layers that it took, or that it was drafted.

const MODES = ["full", "lossless", "exit"];
const HINTS = {
  full: "Every token runs all layers.",
  lossless: "Full depth’s tokens, drafted and verified several at a time.",
  exit: "Tokens stop at the layer that suffices; some may differ from full depth’s.",
};
// both runs of a comparison draw alike
const SEED = 1;

const element = (id) => document.getElementById(id);
const models = new Map();
let messages = [];
let running = null;

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  models.clear();
  for (const model of (await response.json()).data) models.set(model.id, model);
  element("model").replaceChildren(...[...models.keys()].map((id) => new Option(id, id)));
  showModel();
}

const chosenModel = () => models.get(element("model").value);
const chosenMode = () => MODES[element("mode").value];

function showModel() {
  const chats = chosenModel()?.sedac.chat ?? true;
  element("prompt-label").textContent = chats ? "Message" : "Text to continue";
  const stability = (chosenModel()?.sedac.policy ?? "stability") === "stability";
  element("threshold-name").textContent = stability ? "Minimum stability" : "Threshold";
  element("threshold").min = stability ? 0.5 : 0;
  startChat();
}

function showSettings() {
  const mode = chosenMode();
  element("mode-value").textContent = mode;
  element("mode").setAttribute("aria-valuetext", mode);
  element("mode-hint").textContent = HINTS[mode];
  element("own-threshold").disabled = mode !== "exit";
  element("threshold").disabled = mode !== "exit" || !element("own-threshold").checked;
  element("threshold-value").textContent = element("threshold").disabled
    ? "the bundle’s"
    : Number(element("threshold").value).toFixed(3);
  element("temperature-value").textContent = element("temperature").value;
  element("compare").disabled = mode === "full";
  document.body.dataset.colour = document.querySelector("[name=colour]:checked").value;
}

function decoding() {
  const mode = chosenMode();
  if (element("threshold").disabled) return { mode };
  const name = chosenModel().sedac.policy === "stability" ? "tau" : "threshold";
  return { mode, [name]: Number(element("threshold").value) };
}

function request(sedac) {
  const model = chosenModel();
  const body = {
    model: model.id,
    stream: true,
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("tokens").value),
    seed: SEED,
    sedac,
  };
  return model.sedac.chat
    ? { path: "v1/chat/completions", body: { ...body, messages } }
    : { path: "v1/completions", body: { ...body, prompt: messages.map((m) => m.content).join("") } };
}

async function* events(response) {
  let rest = "";
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + piece).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Generates to the end. onTokens is given the tokens of every step.
async function generate(sedac, onTokens, signal) {
  const { path, body } = request(sedac);
  const begun = performance.now();
  const response = await fetch(path, {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await failure(response);
  const answer = { text: "", tokens: [], summary: null, first: null, last: null };
  for await (const event of events(response)) {
    for (const choice of event.choices) {
      answer.text += choice.text ?? choice.delta?.content ?? "";
      answer.summary = choice.sedac?.summary ?? answer.summary;
      const tokens = choice.sedac?.tokens ?? [];
      if (!tokens.length) continue;
      answer.last = performance.now();
      if (answer.first === null) {
        answer.first = answer.last;
        answer.firstTokens = tokens.length;
      }
      answer.tokens.push(...tokens);
      onTokens(tokens);
    }
  }
  answer.wait = answer.first - begun;
  const decoded = answer.tokens.length - answer.firstTokens;
  answer.speed = decoded > 0 ? (decoded / (answer.last - answer.first)) * 1e3 : null;
  return answer;
}

function addMessage(kind, title, text = "") {
  const article = document.createElement("article");
  article.className = `message ${kind}`;
  const heading = document.createElement("h3");
  heading.textContent = title;
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  article.append(heading, paragraph);
  element("log").append(article);
  article.scrollIntoView({ block: "nearest" });
  return paragraph;
}

function tokenSpan(token, layers) {
  const span = document.createElement("span");
  span.className = token.drafted ? "token drafted" : "token";
  span.dataset.layer = token.exit_layer;
  span.style.setProperty("--depth", layers > 1 ? (token.exit_layer - 1) / (layers - 1) : 1);
  const drafted = token.drafted ? ", accepted draft" : "";
  span.title = `layer ${token.exit_layer} of ${layers} (${token.exit_reason})${drafted}`;
  span.textContent = token.text;
  return span;
}

function showMeasurements(answer) {
  const { summary } = answer;
  const rows = [
    ["Speed", answer.speed === null ? "–" : `${answer.speed.toFixed(1)} tokens/s`],
    ["First token after", `${answer.wait.toFixed(0)} ms`],
    ["Tokens", answer.tokens.length],
  ];
  if (summary) {
    rows.push(["Mean exit layer", `${summary.mean_exit_layer.toFixed(1)} of ${summary.num_layers}`]);
    rows.push(["Drafts accepted", `${summary.accepted} of ${summary.drafted}`]);
  }
  if (answer.full) {
    rows.push(["Like full depth", `${answer.same} of ${answer.tokens.length} tokens`]);
    if (answer.full.speed) rows.push(["Full depth’s speed", `${answer.full.speed.toFixed(1)} tokens/s`]);
  }
  element("measurements").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const detail = document.createElement("dd");
    term.textContent = name;
    detail.textContent = value;
    return [term, detail];
  }));
  showHistogram(answer.tokens);
}

function showHistogram(tokens) {
  const counts = new Map();
  for (const { exit_layer: layer } of tokens) counts.set(layer, (counts.get(layer) ?? 0) + 1);
  const rows = [...counts].sort(([a], [b]) => a - b).map(([layer, count]) => {
    const row = document.createElement("tr");
    for (const text of [layer, count, `${((100 * count) / tokens.length).toFixed(0)} %`]) {
      row.insertCell().textContent = text;
    }
    return row;
  });
  element("histogram").tBodies[0].replaceChildren(...rows);
}

// Tokens before the first that full depth would not have given, which is outlined.
function compare(answer, paragraph) {
  const differs = answer.tokens.findIndex((token, at) => token.id !== answer.full.tokens[at]?.id);
  answer.same = differs < 0 ? answer.tokens.length : differs;
  if (differs >= 0) {
    const span = paragraph.children[differs];
    span.classList.add("differs");
    span.title += "; the first token that full depth would not have given";
  }
}

async function answerPrompt(text) {
  const { num_layers: layers } = chosenModel().sedac;
  messages.push({ role: "user", content: text });
  addMessage("user", "You", text);
  const sedac = decoding();
  const paragraph = addMessage("assistant", `${chosenModel().id}, ${sedac.mode}`);
  const show = (tokens) => {
    paragraph.append(...tokens.map((token) => tokenSpan(token, layers)));
    paragraph.parentElement.scrollIntoView({ block: "end" });
  };
  const answer = await generate(sedac, show, running.signal);
  if (element("compare").checked && sedac.mode !== "full") {
    element("status").textContent = "Comparing with full depth…";
    answer.full = await generate({ mode: "full" }, () => {}, running.signal);
    compare(answer, paragraph);
  }
  messages.push({ role: "assistant", content: answer.text });
  showMeasurements(answer);
  element("status").textContent = `Answered with ${answer.tokens.length} tokens: ${answer.text}`;
}

async function send(event) {
  event.preventDefault();
  const text = element("prompt").value;
  if (running || !text.trim() || !chosenModel()) return;
  running = new AbortController();
  setBusy(true);
  const length = messages.length;
  try {
    element("prompt").value = "";
    await answerPrompt(text);
  } catch (error) {
    messages.length = length;
    element("prompt").value = text;
    report(error);
  } finally {
    running = null;
    setBusy(false);
    element("prompt").focus();
  }
}

function report(error) {
  const stopped = error.name === "AbortError";
  element("status").textContent = stopped ? "Stopped." : error.message;
  if (!stopped) addMessage("error", "Error", error.message);
}

function setBusy(busy) {
  element("log").setAttribute("aria-busy", busy);
  element("send").disabled = busy;
  element("stop").disabled = !busy;
  if (busy) element("status").textContent = "Generating…";
}

function startChat() {
  running?.abort();
  messages = [];
  element("log").replaceChildren();
  element("measurements").replaceChildren();
  showHistogram([]);
}

element("form").addEventListener("submit", send);
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", startChat);
element("model").addEventListener("change", showModel);
element("key").addEventListener("change", () => loadModels().catch(report));
document.querySelector("aside").addEventListener("input", showSettings);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});

showSettings();
loadModels().catch(report);
