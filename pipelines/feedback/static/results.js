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

// What a labeller's row may hold against it is marked: somebody should talk to them, or look at what they did.
function doubtful(text, doubt, why) {
  return doubt ? make("span", { className: "doubt", title: why }, text) : text;
}

function pace(l) {
  if (l.seconds == null) return "–";
  return `${l.seconds < 90 ? `${Math.round(l.seconds)} s` : `${(l.seconds / 60).toFixed(1)} min`}`;
}

function labellers(found) {
  const rows = found.map((l) => {
    const kept = l.rankings >= 10 && l.as_shown > 2 * l.as_shown_by_chance + 0.15;
    return [
      l.name, String(l.rankings), String(l.skipped), pace(l),
      doubtful(String(l.hasty), l.hasty > 0.1 * l.rankings, "More than a tenth of the rankings are faster than anybody reads"),
      percent(l.ties),
      doubtful(percent(l.as_shown), kept, `By chance it would be ${percent(l.as_shown_by_chance)}`),
      l.tau == null ? "–" : make("span", {}, doubtful(fixed(l.tau), l.compared >= 5 && l.tau < 0.2, "Hardly more than by chance"),
        ...(l.tau_interval ? [" ", make("span", { className: "range" }, `[${l.tau_interval.map(fixed).join(", ")}]`)] : [])),
      String(l.compared),
    ];
  });
  return panel("Labellers", "Time: median of a ranking. Too fast: more than 100 characters a second. Ties: share of pairs left equal. As shown: rankings that leave the answers in the order in which the page showed them. Agreement: mean Kendall’s τ-b with others over the prompts that somebody else ranked too, and how many these are. What is marked deserves a question.",
    table(["Name", "Rankings", "Skipped", "Time", "Too fast", "Ties", "As shown", "Agreement", "Compared"], rows));
}

function looks(found) {
  const entry = (look) => make("li", {},
    make("a", { href: `./?item=${encodeURIComponent(look.item)}` }, look.prompt || "(no text)"),
    make("ul", {}, ...look.reasons.map((reason) => make("li", {}, reason))));
  if (!found.length) return panel("Worth a second look", "Prompts with contradictions will be listed here.", make("p", {}, "None so far."));
  const more = found.slice(5);
  return panel("Worth a second look", "Where people contradict each other or themselves, skipped, or were very fast. A link opens the prompt for ranking under your own name.",
    make("ul", { className: "looks" }, ...found.slice(0, 5).map(entry)),
    ...(more.length ? [make("details", {}, make("summary", {}, `${more.length} more`), make("ul", { className: "looks" }, ...more.map(entry)))] : []));
}

function figure(value, text) {
  return make("div", { className: "panel figure" }, make("b", {}, value), make("span", {}, text));
}

async function start() {
  const target = document.getElementById("results");
  let response;
  try {
    response = await fetch("api/results");
  } catch {
    return target.replaceChildren(make("p", { className: "panel" }, "The server does not answer. Start it again and reload this page."));
  }
  if (!response.ok) {
    const told = response.status === 503 ? (await response.json()).detail : `The server failed (${response.status}).`;
    return target.replaceChildren(make("p", { className: "panel", role: "alert" }, `${told} Reload this page when it is mended.`));
  }
  const found = await response.json();
  const tags = Object.keys(found.tags);
  const { pairs, alpha } = found.agreement;
  const tagRows = found.models.map((m) => [m.name, ...tags.map((tag) => percent(m.tags[tag]))]);
  target.replaceChildren(
    make("div", { className: "figures" },
      figure(String(found.prompts), "prompts ranked"),
      figure(String(found.rankings), "rankings"),
      figure(String(found.several), "prompts ranked by several"),
      figure(String(found.ideals), "ideal answers"),
      figure(fixed(alpha), "Krippendorff’s α (ordinal)")),
    ...models(found.models),
    panel("Tags", `Share of the ${found.answers} ranked answers with each tag.`,
      table(["", ...tags.map((tag) => tag.replaceAll("_", " "))], [...tagRows, ["all", ...tags.map((tag) => percent(found.tags[tag]))]])),
    labellers(found.labellers),
    panel("Labeller with labeller", "Kendall’s τ-b between two labellers, mean over the prompts that both ranked: 1 the same order, 0 none in common, −1 reversed. Same order: of the pairs that both decided.",
      pairs.length
        ? table(["Labellers", "τ-b", "Same order", "Prompts"], pairs.map((p) => [
            p.labellers.join(" and "), ranged(p.tau, p.interval, fixed), percent(p.same_order), String(p.prompts),
          ]))
        : make("p", {}, "No prompt was ranked by two labellers yet.")),
    looks(found.second_look),
    make("p", { className: "small" }, "Download: ",
      make("a", { href: "export/rankings.jsonl" }, "rankings (for a reward stage)"), " · ",
      make("a", { href: "export/ideal.jsonl" }, "ideal answers (for an sft stage)")),
  );
}

start();
