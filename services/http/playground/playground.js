// The playground: asks the same question in two modes over the service's own HTTP API, and shows what
// its chunks say. No library; texts are only ever set as text.

const MODES = ["greedy", "sample", "s2t", "s2t_local", "takeover", "llm"];
const SIDES = ["greedy", "s2t"];
const EXAMPLES = [
  "Mia has 19 coins . Prices are 11 , 15 , 19 , 4 , 12 . Which two cost 19 ?",
  "Eva has 20 coins . Prices are 13 , 10 , 8 , 9 , 11 . Which two cost 20 ?",
  "Tom has 23 coins . Prices are 6 , 14 , 17 , 5 , 12 . Which two cost 23 ?",
];
const KS = [1, 2, 4, 8, 16, 32, 64];
const isPhone = matchMedia("(max-width: 44rem)"); // as in the style
const byId = (id) => document.getElementById(id);

// -- small things ---------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(end)";
}

function percent(logProb) {
  if (logProb === null || logProb === undefined) return "–";
  const value = 100 * Math.exp(logProb);
  return value >= 99.95 ? "100 %" : value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

function say(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
}

class ServiceError extends Error {}

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("the service does not answer; is it running?");
  }
  if (response.ok) return response;
  if (response.status === 401 || response.status === 403) {
    byId("access").hidden = false;
    byId("access").open = true;
  }
  let text = `${response.status} ${response.statusText}`;
  try {
    text = (await response.json()).error.message;
  } catch { /* no JSON: a proxy's own page */ }
  throw new ServiceError(text);
}

// -- pages ----------------------------------------------------------------------------------------

const PAGES = { ask: () => {}, versions: showVersions, sufficiency: showSufficiency };

let page = "ask";

function showPage() {
  const asked = location.hash.slice(1);
  page = Object.hasOwn(PAGES, asked) ? asked : page;
  for (const name of Object.keys(PAGES)) byId(name).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  hideTip();
  PAGES[page]();
}

let service = null;

async function showService() {
  try {
    service = await (await call("v1/s2t/service")).json();
  } catch (error) {
    say(error.message);
    return;
  }
  say("");
  byId("model").textContent = service.model;
  const llm = service.llm_reachable ? "LLM reachable" : "no LLM";
  const local = service.live_version ? `version ${service.live_version}` : "no version live";
  byId("service").textContent = `${llm}, ${local}`;
  const bundled = service.model === "bundled";
  byId("example").hidden = !bundled;
  if (bundled && !byId("prompt").value) byId("prompt").value = EXAMPLES[0];
}

// -- asking ---------------------------------------------------------------------------------------

const sides = SIDES.map((mode, index) => {
  const article = byId("answer-template").content.cloneNode(true).querySelector("article");
  article.setAttribute("aria-label", `Answer ${index + 1}`);
  const select = article.querySelector(".mode");
  for (const name of MODES) select.append(element("option", { value: name }, name));
  select.value = mode;
  byId("answers").append(article);
  const part = (name) => article.querySelector(`.${name}`);
  return { article, select, part };
});

let asking = null;

async function ask() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  say("");
  hideTip();
  byId("stop").disabled = false;
  byId("progress").textContent = "Both are answering.";
  const results = await Promise.all(sides.map((side) => answer(side, signal)));
  if (asking?.signal === signal) {
    byId("stop").disabled = true;
    byId("progress").textContent = results.join(" ");
  }
}

function body(mode) {
  const prompt = byId("prompt").value;
  const trigger = byId("trigger").value;
  const s2t = { steps: true, mode, trigger, candidates: byId("candidates").valueAsNumber || 8 };
  if (trigger !== "always") s2t.budget = (byId("budget").valueAsNumber || 5) / 100;
  const asked = {
    model: service?.model ?? "",
    max_tokens: byId("max-tokens").valueAsNumber || 200,
    stream: true,
    s2t,
  };
  if (!service?.template_digest) return ["v1/completions", { ...asked, prompt }];
  return ["v1/chat/completions", { ...asked, messages: [{ role: "user", content: prompt }] }];
}

async function answer(side, signal) {
  const mode = side.select.value;
  const shown = new Shown(side, mode);
  try {
    if (service === null) await showService();
    const [path, asked] = body(mode);
    const response = await call(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(asked),
      signal,
    });
    for await (const chunk of events(response)) shown.add(chunk);
    return shown.end();
  } catch (error) {
    return shown.fail(error.name === "AbortError" ? "stopped" : error.message);
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServiceError(chunk.error.message);
      yield chunk;
    }
  }
}

/** What one side shows of its answer. */
class Shown {
  constructor(side, mode) {
    this.side = side;
    this.mode = mode;
    this.text = "";
    this.tokens = this.asked = this.changed = this.llm = 0;
    this.forwards = null; // exact, when the answer has ended
    this.started = performance.now();
    const text = side.part("text");
    text.replaceChildren();
    text.classList.add("writing");
    side.article.setAttribute("aria-busy", "true");
    side.part("state").textContent = "waiting";
    this.show();
  }

  add(chunk) {
    const [choice] = chunk.choices;
    const extra = chunk.s2t ?? {};
    this.side.part("state").textContent = "writing";
    this.tokens += extra.tokens ?? 0;
    this.write(choice.delta?.content ?? choice.text ?? "", extra.divergences ?? []);
    if (extra.usage) {
      this.forwards = extra.usage.llm_forwards;
      this.tokens = extra.usage.completion_tokens;
      this.reason = choice.finish_reason;
    }
    this.show();
  }

  write(text, divergences) {
    const start = this.text.length;
    let at = 0;
    for (const divergence of divergences) {
      const place = divergence.offset - start;
      const space = divergence.text.match(/^\s*/)[0]; // in front of the mark, not in it
      this.append(text.slice(at, place) + space);
      this.append(token(divergence, divergence.text.slice(space.length)));
      at = place + divergence.text.length;
      this.asked += 1;
      this.changed += divergence.flipped ? 1 : 0;
      this.llm += divergence.chosen_by === "llm" ? 1 : 0;
      remember(divergence);
    }
    this.append(text.slice(at));
    this.text += text;
  }

  append(part) {
    if (part) this.side.part("text").append(part);
  }

  show() {
    const seconds = (performance.now() - this.started) / 1000;
    const forwards = this.forwards ?? (this.mode === "llm" ? this.tokens : this.llm);
    const set = (name, value) => { this.side.part(name).textContent = value; };
    set("tokens", this.tokens);
    set("forwards", this.tokens ? (forwards / this.tokens).toFixed(3) : "0");
    set("asked", `${this.asked}, ${this.changed}`);
    set("seconds", seconds.toFixed(2));
    set("speed", this.tokens ? (this.tokens / seconds).toFixed(1) : "0");
  }

  finish(state) {
    this.side.part("text").classList.remove("writing");
    this.side.part("state").textContent = state;
    this.side.article.setAttribute("aria-busy", "false");
  }

  end() {
    this.finish(this.reason === "length" ? "cut at the limit" : "done");
    return `${this.mode}: ${this.tokens} tokens, ${this.asked} asked, ${this.changed} changed: ` +
      `${this.text.trim()}`;
  }

  fail(reason) {
    this.finish(reason === "stopped" ? "stopped" : "failed");
    if (reason !== "stopped") {
      this.append(element("span", { class: "refused" }, reason));
    }
    return `${this.mode}: ${reason}.`;
  }
}

// -- divergences ----------------------------------------------------------------------------------

const WHO = {
  slm: "the small model, by itself",
  sampler: "drawn from the small model",
  llm: "the large model",
  local: "the local selector",
};

function token(divergence, text) {
  const kind = divergence.degraded ? "degraded" : divergence.flipped ? "flipped" : "kept";
  const made = element("button", { type: "button", class: `token ${kind}` },
    text || visible(divergence.text));
  const show = () => showTip(made, divergence);
  // In a narrow window the page scrolls so that the token stays visible: away from under the mouse.
  const ifMouse = (then) => (event) => {
    if (event.pointerType === "mouse" && !isPhone.matches) then();
  };
  made.addEventListener("focus", show);
  made.addEventListener("blur", hideTip);
  made.addEventListener("click", show); // Safari does not focus what it clicks
  made.addEventListener("pointerenter", ifMouse(show));
  made.addEventListener("pointerleave", ifMouse(hideTip));
  return made;
}

function showTip(anchor, divergence) {
  hideTip();
  const tip = byId("tip");
  const who = WHO[divergence.chosen_by] ?? divergence.chosen_by;
  const was = divergence.alternatives[0];
  const lines = [element("p", {}, element("strong", {}, `Chosen by ${who}.`))];
  if (divergence.degraded) lines.push(element("p", {}, `Not selected: ${divergence.degraded}`));
  if (divergence.flipped && was) {
    lines.push(element("p", {}, `The small model alone would have written `,
      element("span", { class: "piece" }, visible(was.text)), "."));
  }
  tip.replaceChildren(...lines, candidates(divergence));
  tip.hidden = false;
  anchor.setAttribute("aria-describedby", "tip");
  placeTip();
}

/** Below the token, or above it where there is more room; on a phone the style keeps it at the bottom. */
function placeTip() {
  const anchor = document.querySelector("[aria-describedby=tip]");
  if (!anchor) return;
  const tip = byId("tip");
  const box = anchor.getBoundingClientRect();
  const below = box.bottom + tip.offsetHeight + 8 <= innerHeight || box.top < innerHeight / 2;
  const top = below ? box.bottom + 6 : Math.max(8, box.top - 6 - tip.offsetHeight);
  tip.style.top = `${top}px`;
  const covered = box.bottom + 6 - tip.getBoundingClientRect().top;
  if (isPhone.matches && box.bottom > 0 && covered > 0) scrollBy(0, covered);
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

function candidates(divergence) {
  const local = divergence.alternatives.some((a) => a.local !== null);
  const rows = [...divergence.alternatives];
  const chosen = divergence.chosen;
  if (chosen && !rows.some((a) => a.token_id === chosen.token_id)) rows.push(chosen);
  const head = element("tr", {},
    element("th", { scope: "col" }, "Candidate"),
    element("th", { scope: "col", class: "number" }, "Small model"),
    element("th", { scope: "col", class: "number" }, "Large model"),
    local ? element("th", { scope: "col", class: "number" }, "Local score") : null);
  const body = rows.map((row) => {
    const taken = row.token_id === chosen?.token_id;
    return element("tr", { class: taken ? "chosen" : null },
      element("th", { scope: "row" }, element("span", { class: "piece" }, visible(row.text)),
        taken ? " ✓" : "", taken ? element("span", { class: "visually-hidden" }, " chosen") : ""),
      cell(row.slm, "slm"),
      cell(row.llm, "llm"),
      local ? element("td", { class: "number" }, row.local?.toFixed(2) ?? "–") : null);
  });
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function cell(logProb, side) {
  const known = logProb !== null && logProb !== undefined;
  return element("td", { class: "number" }, known ? bar(Math.exp(logProb), side) : null,
    element("span", { class: "value" }, percent(logProb)));
}

function bar(share, side) {
  const made = element("span", { class: `bar ${side}`, "aria-hidden": "true" });
  made.style.setProperty("--share", share);
  return made;
}

// -- versions -------------------------------------------------------------------------------------

async function showVersions() {
  const place = byId("versions-table");
  let versions;
  try {
    versions = (await (await call("v1/s2t/versions")).json()).data;
  } catch (error) {
    place.replaceChildren(element("p", {}, `They cannot be read: ${error.message}`));
    return;
  }
  say("");
  if (!versions.length) {
    place.replaceChildren(element("p", {}, "None is published yet; ", element("code", {}, "s2t train"),
      " makes one."));
    return;
  }
  place.replaceChildren(element("ol", { class: "versions" }, ...versions.reverse().map(card)));
}

function card(version) {
  const agree = version.metrics.agree_at_1;
  const facts = [
    `published ${new Date(1000 * version.created_at).toLocaleString()}`,
    `kind ${version.kind}, reads ${version.reads}`,
    agree === undefined ? "Agree@1 not measured" : `Agree@1 ${agree.toFixed(3)}`,
  ];
  const percents = `${(100 * version.share).toFixed(0)} % of the requests`;
  let serves = null;
  if (version.live) serves = `live, ${percents}`;
  else if (version.share > 0) serves = `canary, ${percents}`;
  return element("li", {},
    element("h2", {}, version.name, serves ? element("span", { class: "badge" }, serves) : null),
    element("p", { class: "hint" }, facts.join(" · ")),
    ...verdict(version.gate));
}

function verdict(gate) {
  if (!gate) return [element("p", {}, "Gate: not judged")];
  const reasons = (gate.reasons ?? []).map((reason) => element("li", {}, reason));
  const word = gate.passed ? "opened" : "refused";
  const kind = gate.passed ? "passed" : "refused";
  return [
    element("p", {}, "Gate: ", element("span", { class: kind }, word)),
    reasons.length ? element("ul", {}, ...reasons) : null,
  ];
}

// -- local sufficiency ----------------------------------------------------------------------------

function remembered() {
  return JSON.parse(sessionStorage.getItem("ranks") ?? "[]");
}

function remember(divergence) {
  if (divergence.llm_top_rank === null) return;
  const ranks = [...remembered(), divergence.llm_top_rank].slice(-20000);
  sessionStorage.setItem("ranks", JSON.stringify(ranks));
}

function showSufficiency() {
  const ranks = remembered();
  const place = byId("sufficiency-table");
  if (!ranks.length) {
    place.replaceChildren(element("p", {}, "No step yet at which the large model was asked: ask " +
      "something in mode s2t first."));
    return;
  }
  const rows = KS.map((k) => {
    const share = ranks.filter((rank) => rank >= 0 && rank < k).length / ranks.length;
    return element("tr", {}, element("th", { scope: "row" }, String(k)),
      element("td", { class: "number" }, bar(share, "slm"),
        element("span", { class: "value" }, `${(100 * share).toFixed(1)} %`)));
  });
  const head = element("tr", {}, element("th", { scope: "col" }, "K"),
    element("th", { scope: "col", class: "number" }, "Hit@K"));
  const steps = `${ranks.length} ${ranks.length === 1 ? "step" : "steps"}`;
  place.replaceChildren(element("table", { class: "hits" },
    element("caption", {}, steps),
    element("thead", {}, head), element("tbody", {}, ...rows)));
}

// -- start ----------------------------------------------------------------------------------------

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
});
byId("stop").addEventListener("click", () => asking?.abort());
byId("example").addEventListener("click", () => {
  const next = EXAMPLES.indexOf(byId("prompt").value) + 1;
  byId("prompt").value = EXAMPLES[next % EXAMPLES.length];
});
byId("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  await showService();
  showPage();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
addEventListener("scroll", placeTip, { passive: true });
addEventListener("resize", placeTip);
addEventListener("hashchange", showPage);
showPage();
showService();
