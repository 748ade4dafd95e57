// The results page: what `results.summary` says, as tables; names and tags are only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (value) => (value == null ? "–" : `${Math.round(value * 100)} %`);
const fixed = (value) => (value == null ? "–" : value.toFixed(2).replace("-", "−"));

function ranged(value, interval, write) {
  const text = make("span", {}, write(value));
  if (interval) text.append(" ", make("span", { className: "range" }, `[${interval.map((end) => write(end).replace(" %", "")).join(", ")}]`));
  return text;
}

function table(head, rows) {
  const cells = (kind, row) => row.map((cell) => (cell instanceof HTMLTableCellElement ? cell : make(kind, {}, cell)));
  return make("div", { className: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...cells("th", head))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row))))));
}

function panel(title, about, ...content) {
  return make("section", { className: "panel" }, make("h2", {}, title), make("p", { className: "small" }, about), ...content);
}

function line(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// An interval with its middle on a scale from low to high.
function chart(value, [from, to], low, high) {
  const at = (x) => `${2 + (96 * (x - low)) / (high - low)}%`;
  const picture = line("svg", { role: "img", "aria-label": `${Math.round(value)}, from ${Math.round(from)} to ${Math.round(to)}` });
  picture.append(
    line("line", { class: "axis", x1: at(1000), x2: at(1000), y1: "0", y2: "100%" }),
    line("line", { class: "interval", x1: at(from), x2: at(to), y1: "50%", y2: "50%" }),
    line("circle", { class: "dot", cx: at(value), cy: "50%", r: "4" }),
  );
  return make("td", { className: "chart" }, picture);
}

function models(found) {
  if (found[0]?.elo == null) return []; // nobody compared two models
  const ends = found.flatMap((m) => [...m.elo_interval, m.elo, 1000]);
  const [low, high] = [Math.min(...ends) - 5, Math.max(...ends) + 5];
  const whole = (value) => String(Math.round(value));
  const others = found.map((m) => m.name);
  const out = [
    panel("Models", "Elo from Bradley–Terry strengths, mean 1000 (dotted); 400 points are odds of 10 to 1. Win rate over all pairs with other models, a tie is half. 95 % bootstrap intervals over prompts. Position: 0 best, 1 worst.",
      table(["Model", "Elo", make("th", { className: "chart" }), "Win rate", "Position", "Answers"], found.map((m) => [
        m.name, ranged(m.elo, m.elo_interval, whole), chart(m.elo, m.elo_interval, low, high),
        ranged(m.win_rate, m.win_rate_interval, percent), fixed(m.position), String(m.answers),
      ]))),
  ];
  if (others.length > 2) {
    out.push(panel("Model against model", "How often the model of the row is preferred to the model of the column.",
      table(["", ...others], found.map((m) => [m.name, ...others.map((other) => percent(m.against[other]))]))));
  }
  return out;
}

function figure(value, text) {
  return make("div", { className: "panel figure" }, make("b", {}, value), make("span", {}, text));
}

async function start() {
  const response = await fetch("api/results");
  const target = document.getElementById("results");
  if (!response.ok) {
    target.replaceChildren(make("p", { className: "panel" }, `The server failed (${response.status}).`));
    return;
  }
  const found = await response.json();
  const tags = Object.keys(found.tags);
  const { pairs, alpha } = found.agreement;
  const tagRows = found.models.map((m) => [m.name, ...tags.map((tag) => percent(m.tags[tag]))]);
  target.replaceChildren(
    make("div", { className: "figures" },
      figure(String(found.prompts), "prompts ranked"),
      figure(String(found.rankings), "rankings"),
      figure(String(found.ideals), "ideal answers"),
      figure(fixed(alpha), "Krippendorff’s α (ordinal)")),
    ...models(found.models),
    panel("Tags", `Share of the ${found.answers} ranked answers with each tag.`,
      table(["", ...tags.map((tag) => tag.replaceAll("_", " "))], [...tagRows, ["all", ...tags.map((tag) => percent(found.tags[tag]))]])),
    panel("Labellers", "Ties: share of pairs left equal.",
      table(["Name", "Rankings", "Skipped", "Median time", "Ties"], found.labellers.map((l) => [
        l.name, String(l.rankings), String(l.skipped), l.seconds == null ? "–" : `${Math.round(l.seconds)} s`, percent(l.ties),
      ]))),
    panel("Agreement", "Kendall’s τ-b between two labellers, mean over the prompts that both ranked: 1 the same order, 0 none in common, −1 reversed. Same order: of the pairs that both decided.",
      pairs.length
        ? table(["Labellers", "τ-b", "Same order", "Prompts"], pairs.map((p) => [
            p.labellers.join(" and "), ranged(p.tau, p.interval, fixed), percent(p.same_order), String(p.prompts),
          ]))
        : make("p", {}, "No prompt was ranked by two labellers yet.")),
    make("p", { className: "small" }, "Download: ",
      make("a", { href: "export/rankings.jsonl" }, "rankings (for a reward stage)"), " · ",
      make("a", { href: "export/ideal.jsonl" }, "ideal answers (for an sft stage)")),
  );
}

start();
