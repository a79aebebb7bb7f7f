"use strict";
// The answer viewer. All text goes in as text nodes: an answer cannot become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const select = document.getElementById("problem");
const decisionBox = document.getElementById("decision");

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function percent(value) {
  return value === null || value === undefined ? "" : (100 * value).toFixed(1) + " %";
}

function visible(text) {
  return text.replace(/\n/g, "⏎") || "(end)";
}

function showDecision(row, decision) {
  const names = { llm: "the LLM", local: "the local selector", slm: "the SLM" };
  const who = names[decision.by] || decision.by;
  const changed = decision.chosen !== decision.first;
  let sentence = `${row}, token ${decision.i}: chosen by ${who}`;
  sentence += changed ? ", changed." : ", as the SLM would.";
  if (decision.signal !== null) sentence += ` Signal ${decision.signal.toFixed(3)}.`;
  if (decision.why) sentence += ` Degraded: ${decision.why}.`;
  const table = element("table");
  const head = element("tr");
  const scored = decision.candidates.some((candidate) => candidate[3] !== null);
  for (const name of ["candidate", "SLM", scored ? "local score" : "LLM"]) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(head);
  decision.candidates.forEach(([text, slm, llm, score], place) => {
    const line = element("tr", undefined, place === decision.chosen ? "chosen" : "");
    const mark = place === decision.chosen ? " ✓" : "";
    line.append(element("th", visible(text) + mark));
    line.append(element("td", percent(slm)));
    line.append(element("td", scored ? (score === null ? "" : score.toFixed(2)) : percent(llm)));
    table.append(line);
  });
  decisionBox.replaceChildren(element("p", sentence), table);
}

function showAnswer(answer) {
  const box = element("article", undefined, "answer");
  const title = element("h3", answer.row + " ");
  const verdict = answer.error ? "failed" : answer.cut ? "cut off" : answer.right ? "right" : "wrong";
  title.append(element("span", "– " + verdict, answer.right ? "is-right" : "is-wrong"));
  const text = element("p");
  const decisions = new Map(answer.decisions.map((decision) => [decision.i, decision]));
  answer.pieces.forEach((piece, index) => {
    const decision = decisions.get(index);
    if (!decision) {
      text.append(piece);
      return;
    }
    const changed = decision.chosen !== decision.first;
    text.append(piece.slice(0, piece.length - piece.trimStart().length));
    const token = element("button", visible(piece.trimStart()), changed ? "token changed" : "token");
    token.type = "button";
    token.setAttribute("aria-pressed", "false");
    token.setAttribute("aria-label", `${visible(piece)}, divergence point${changed ? ", changed" : ""}`);
    token.addEventListener("click", () => {
      for (const other of document.querySelectorAll("button.token")) other.setAttribute("aria-pressed", "false");
      token.setAttribute("aria-pressed", "true");
      showDecision(answer.row, decision);
    });
    text.append(token);
  });
  if (answer.error) text.append(answer.error);
  box.append(title, text);
  return box;
}

function showProblem(place) {
  const problem = data.problems[place];
  document.getElementById("prompt").textContent = problem.prompt;
  document.getElementById("expected").textContent = problem.expected ? "Right: " + problem.expected : "";
  document.getElementById("answers").replaceChildren(...problem.answers.map(showAnswer));
  decisionBox.textContent = "No token is chosen.";
}

data.problems.forEach((problem, place) => {
  const option = element("option", problem.id);
  option.value = String(place);
  select.append(option);
});
select.addEventListener("change", () => showProblem(Number(select.value)));
function move(by) {
  const count = data.problems.length;
  select.value = String((Number(select.value) + by + count) % count);
  showProblem(Number(select.value));
}
document.getElementById("previous").addEventListener("click", () => move(-1));
document.getElementById("next").addEventListener("click", () => move(1));
if (data.problems.length) showProblem(0);
