// The ranking page. One draft (what the labeller has done to the prompt on screen) is the state: `change` alters it, keeps
// it in the browser and calls `arrange`, which makes the page look like it. Text from models is only ever set as text.

const LETTERS = "ABCDEFGHI";
const IDLE = 60_000; // after this long without a key or a pointer the clock of a prompt stands still
const $ = (id) => document.getElementById(id);

let session; // store, tags, labellers
let labeller = sessionStorage.getItem("labeller");
let tab = sessionStorage.getItem("tab");
let shown = null; // the server's answer: item, prompt, answers, judgement, back, forward, progress
let draft = null; // id, tab, item, replaces, sent, ranks, tags, note, ideal, seconds
let before = []; // ranks and tags before each change, for undo
let cards = []; // one element for each answer
let current = 0; // the answer that keys act on
let busy = false; // a request is under way: nothing may change

const newId = () => crypto.randomUUID();

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children); // strings become text nodes
  return element;
}

function say(text) {
  $("say").textContent = text;
}

function status(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

// --- the server ---------------------------------------------------------------------------------------------------

// Ask until the server answers: every request may be repeated, because a judgement has an id of its own.
async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let wait = 500; ; wait = Math.min(wait * 2, 4000)) {
    let trouble;
    try {
      const response = await fetch(`api/${path}`, options);
      if (response.status < 500) {
        const data = response.status === 403 ? { detail: await response.text() } : await response.json();
        $("banner").hidden = true;
        return { ok: response.ok, code: response.status, data };
      }
      trouble = response.status === 503 ? (await response.json()).detail : `The server failed (${response.status}).`;
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error; // no answer, or half of one
      trouble = "The server does not answer.";
    }
    $("banner").textContent = `${trouble} ${body ? "This is not saved yet. It" : "Your work"} is kept in this browser; trying again …`;
    $("banner").hidden = false;
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

function refusal(data) {
  return typeof data.detail === "string" ? data.detail : (data.detail ?? []).map((d) => d.msg).join("; ");
}

async function locked(work) {
  if (busy) return;
  busy = true;
  $("work").inert = true;
  try {
    await work();
  } finally {
    busy = false;
    $("work").inert = false;
    if (shown?.item) focusCard(current);
  }
}

// --- which prompt -------------------------------------------------------------------------------------------------

const draftKey = (item) => `draft:${session.store}:${labeller}:${item}`;

async function load(item, notice = "") {
  const query = new URLSearchParams({ labeller, tab, ...(item ? { item } : {}) });
  const { ok, code, data } = await call(`item?${query}`);
  if ((code === 404 || code === 422) && item) return load(null, notice);
  if (!ok) return status(refusal(data), "bad");
  shown = data;
  progress(data.progress);
  if (data.item) sessionStorage.setItem("item", data.item);
  else sessionStorage.removeItem("item");
  const kept = data.item && JSON.parse(localStorage.getItem(draftKey(data.item)));
  if (kept && kept.id === data.judgement?.id) {
    localStorage.removeItem(draftKey(data.item)); // it had been saved when the page went away
    return load(null, "Saved");
  }
  if (data.item) open(data, kept);
  show(data.item ? "work" : "done");
  if (kept) notice = "Your unsaved work is back";
  status(notice, notice === "Saved" ? "good" : "");
  const where = data.judgement ? "Correcting a saved ranking." : "";
  say(`${notice ? notice + ". " : ""}${data.item ? `${where} ${data.answers.length} answers to rank.` : "All prompts are done."}`);
}

function open(data, kept) {
  const saved = data.judgement;
  const count = data.answers.length;
  if (kept && kept.tab !== tab) kept = { ...kept, tab, id: newId(), sent: [] }; // another tab's work, gone or still open
  draft = {
    id: newId(),
    tab,
    item: data.item,
    sent: [],
    ranks: saved?.ranks?.slice() ?? Array(count).fill(null),
    tags: saved?.tags ?? data.answers.map(() => []),
    note: saved?.note ?? "",
    ideal: saved?.ideal ?? "",
    seconds: saved?.seconds ?? 0,
    ...kept,
    replaces: saved?.id ?? null,
  };
  before = [];
  current = 0;
  $("note").value = draft.note;
  $("ideal").value = draft.ideal;
  $("prompt").replaceChildren(...turns(data.prompt));
  cards = data.answers.map(card);
  document.body.classList.toggle("many", count > 6);
  $("places").replaceChildren();
  $("pool").replaceChildren();
  arrange(false);
  window.scrollTo(0, 0);
}

function turns(prompt) {
  if (typeof prompt === "string") return [make("div", { className: "text" }, prompt)];
  return prompt.map((message) =>
    make("div", { className: `turn ${message.role === "user" ? "user" : "other"}` },
      make("div", { className: "role" }, message.role),
      make("div", { className: "text" }, message.content)));
}

function progress(p) {
  $("progress").hidden = false;
  $("progress-bar").max = p.total;
  $("progress-bar").value = p.judged;
  const parts = [`${p.judged} of ${p.total}`];
  if (p.skipped) parts.push(`${p.skipped} skipped`);
  if (p.an_hour) {
    const minutes = Math.ceil(((p.total - p.judged) / p.an_hour) * 60);
    parts.push(`${p.an_hour} an hour`);
    if (minutes) parts.push(minutes < 90 ? `${minutes} min left` : `${Math.round(minutes / 60)} h left`);
  }
  $("progress-text").textContent = parts.join(" · ");
  $("done-text").textContent = `You ranked ${p.judged - p.skipped} and skipped ${p.skipped} of ${p.total} prompts.`;
}

function show(name) {
  for (const section of ["start", "work", "done"]) $(section).hidden = section !== name;
  $("actions").hidden = name === "start";
  for (const button of ["undo", "skip", "save"]) $(button).hidden = name !== "work";
  $("who").hidden = name === "start";
  $("who").textContent = labeller ?? "";
  $("back").disabled = !shown?.back;
  $("forward").hidden = !shown?.judgement;
  $("save-more").textContent = shown?.judgement ? " correction" : " and next";
}

async function save(skipped) {
  if (!draft || !shown?.item) return;
  const open = draft.ranks.flatMap((rank, i) => (rank === null ? [i] : []));
  if (!skipped && open.length) {
    status(`${open.length} not ranked yet`, "bad");
    say(`${open.length} answers are not ranked yet, the first is ${LETTERS[open[0]]}.`);
    return focusCard(open[0]);
  }
  await locked(async () => {
    const correction = shown.judgement !== null;
    for (;;) {
      if (!draft.sent.includes(draft.id)) draft.sent.push(draft.id);
      keep();
      status("Saving …");
      const { id, item, replaces, tags, note, ideal, seconds } = draft;
      const body = { id, item, labeller, replaces, ranks: skipped ? null : draft.ranks, tags, note, ideal, seconds };
      const { ok, code, data } = await call("judgement", body);
      if (ok) break;
      if (code !== 409) return status(`Not saved: ${refusal(data)}`, "bad");
      const ours = draft.sent.includes(data.judgement?.id); // an earlier try whose answer got lost
      draft.replaces = data.judgement?.id ?? null;
      draft.id = newId();
      keep();
      if (!ours) {
        status("Not saved: this prompt was judged in another tab meanwhile. Save again to replace that.", "bad");
        return say("Not saved. This prompt was judged in another tab meanwhile. Save again to replace that judgement.");
      }
    }
    localStorage.removeItem(draftKey(draft.item));
    await load(correction ? shown.forward : null, skipped ? "Skipped" : "Saved");
  });
}

const go = (item) => locked(() => load(item));

// --- changing the draft -------------------------------------------------------------------------------------------

function keep() {
  localStorage.setItem(draftKey(draft.item), JSON.stringify(draft));
}

function touched() {
  if (draft.sent.includes(draft.id)) draft.id = newId(); // what was sent under that id was something else
  keep();
}

function change(alter, announce) {
  if (busy) return;
  before.push(JSON.stringify([draft.ranks, draft.tags]));
  alter();
  touched();
  status("");
  arrange();
  say(announce?.() ?? describe(current));
}

function undo() {
  if (!before.length || busy) return say("Nothing to undo.");
  [draft.ranks, draft.tags] = JSON.parse(before.pop());
  touched();
  arrange();
  say("Undone.");
}

// Places in use, best first, each with its answers: [[1, [2, 0]], [3, [1]]]. Gaps are closed by the server.
function groups() {
  const places = [...new Set(draft.ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
  return places.map((place) => [place, draft.ranks.flatMap((rank, i) => (rank === place ? [i] : []))]);
}

function insert(i, place) { // between two places: half a number, then numbers are whole again
  draft.ranks[i] = place;
  const places = groups().map(([p]) => p);
  draft.ranks = draft.ranks.map((rank) => (rank === null ? null : places.indexOf(rank) + 1));
}

function place(i, number, advance = false) {
  if (number > cards.length) return say(`There are ${cards.length} answers: places 1 to ${cards.length}.`);
  const wasOpen = draft.ranks[i] === null;
  change(() => { draft.ranks[i] = number; }, () => describe(i));
  const open = [...cards.keys()].map((n) => (i + 1 + n) % cards.length).find((n) => draft.ranks[n] === null);
  if (advance && wasOpen && open !== undefined) focusCard(open);
}

function remove(i) {
  if (draft.ranks[i] !== null) change(() => { draft.ranks[i] = null; });
}

function move(i, step) {
  const all = groups();
  const at = all.findIndex(([, members]) => members.includes(i));
  if (at < 0) return change(() => insert(i, all.length ? all.at(-1)[0] + 1 : 1));
  const tied = all[at][1].length > 1;
  const target = tied ? all[at][0] : all[at + step]?.[0];
  if (target !== undefined) change(() => insert(i, target + step / 2));
}

function tie(i) {
  const all = groups();
  const at = all.findIndex(([, members]) => members.includes(i));
  if (at >= 0 && all[at][1].length > 1) return change(() => insert(i, all[at][0] + 0.5));
  const above = at < 0 ? all.at(-1) : all[at - 1];
  if (!above) return say("There is no answer above to tie with.");
  change(() => insert(i, above[0]));
}

function toggle(i, tag) {
  if (tag === undefined) return;
  const has = draft.tags[i].includes(tag);
  change(
    () => { draft.tags[i] = has ? draft.tags[i].filter((t) => t !== tag) : [...draft.tags[i], tag]; },
    () => `${tag} ${has ? "removed from" : "set on"} answer ${LETTERS[i]}.`,
  );
}

function describe(i) {
  const others = draft.ranks.flatMap((rank, n) => (rank !== null && rank === draft.ranks[i] && n !== i ? [LETTERS[n]] : []));
  const where = draft.ranks[i] === null ? "not ranked" : `place ${draft.ranks[i]}`;
  const tags = draft.tags[i].length ? `, tagged ${draft.tags[i].join(", ")}` : "";
  return `Answer ${LETTERS[i]}, ${where}${others.length ? `, tied with ${others.join(", ")}` : ""}${tags}`;
}

// --- the page as the draft says -----------------------------------------------------------------------------------

function card(text, i) {
  const places = shown.answers.map((_, n) => make("button", {
    type: "button", className: "place-button", textContent: n + 1, title: `Place ${n + 1}`,
    onclick: () => (draft.ranks[i] === n + 1 ? remove(i) : place(i, n + 1)),
  }));
  const tags = session.tags.map((tag, n) => make("button", {
    type: "button", className: "tag", title: n < 9 ? `Shift ${n + 1}` : "", onclick: () => toggle(i, tag),
  }, tag.replaceAll("_", " ")));
  const numbers = make("div", { className: "place-buttons", role: "group", ariaLabel: `Place of answer ${LETTERS[i]}` }, ...places);
  const head = make("div", { className: "head", title: "Drag to rank" },
    make("span", { className: "grip", ariaHidden: "true" }), make("span", { className: "letter" }, LETTERS[i]), numbers);
  const element = make("article", { className: "card", id: `answer-${LETTERS[i]}` }, head,
    make("div", { className: "text" }, text),
    make("div", { className: "tags", role: "group", ariaLabel: `What is wrong with answer ${LETTERS[i]}` }, ...tags));
  element.addEventListener("focusin", () => select(i));
  element.addEventListener("pointerdown", () => select(i));
  head.addEventListener("pointerdown", (event) => drag(event, i));
  return element;
}

function select(i) {
  current = i;
  cards.forEach((element, n) => {
    element.tabIndex = n === i ? 0 : -1; // one stop for Tab, and then the buttons of this answer
    element.classList.toggle("current", n === i);
    for (const button of element.querySelectorAll("button")) button.tabIndex = n === i ? 0 : -1;
  });
}

function focusCard(i) {
  select(i);
  cards[i].focus({ preventScroll: true });
  cards[i].scrollIntoView({ block: "nearest", behavior: "auto" });
}

function arrange(animate = true) {
  const active = document.activeElement;
  const from = cards.map((element) => element.isConnected && element.getBoundingClientRect());
  const all = groups();
  $("places").replaceChildren(...all.map(([number, members]) =>
    make("li", { className: members.length > 1 ? "place tied" : "place" },
      make("div", { className: "number" }, make("b", {}, String(number)), members.length > 1 ? make("span", {}, "tie") : ""),
      make("div", { className: "stack" }, ...members.map((i) => cards[i])))));
  if (!all.length) $("places").append(make("li", { className: "empty" }, "Drag the best answer here, or give each answer a number"));
  const open = draft.ranks.flatMap((rank, i) => (rank === null ? [i] : []));
  $("pool").replaceChildren(...open.map((i) => cards[i]));
  $("pool-area").hidden = !open.length;
  $("hint").textContent = open.length ? `best first · ${open.length} of ${cards.length} to go` : "best first · complete";
  $("save").classList.toggle("waiting", open.length > 0);
  $("undo").disabled = !before.length;
  cards.forEach((element, i) => {
    element.ariaLabel = describe(i);
    element.querySelectorAll(".place-button").forEach((b, n) => { b.ariaPressed = String(draft.ranks[i] === n + 1); });
    element.querySelectorAll(".tag").forEach((b, n) => { b.ariaPressed = String(draft.tags[i].includes(session.tags[n])); });
    const to = element.getBoundingClientRect();
    const moved = from[i] && (from[i].top !== to.top || from[i].left !== to.left);
    if (animate && moved && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
      const shift = `translate(${from[i].left - to.left}px, ${from[i].top - to.top}px)`;
      element.animate([{ transform: shift }, { transform: "none" }], { duration: 160, easing: "ease-out" });
    }
  });
  select(current);
  if (active?.isConnected && cards.some((element) => element.contains(active))) active.focus({ preventScroll: true });
}

// --- dragging -----------------------------------------------------------------------------------------------------

// Pointer events rather than the browser's drag and drop, which fingers cannot use.
function drag(event, i) {
  if (event.button !== 0 || busy || event.target.closest("button")) return;
  if (event.pointerType === "touch" && !event.target.closest(".grip")) return; // a finger elsewhere scrolls
  const head = event.currentTarget;
  const start = { x: event.clientX, y: event.clientY };
  let ghost = null;
  let point = start;
  let target = null;

  const follow = () => {
    if (!ghost) return;
    ghost.style.transform = `translate(${point.x + 8}px, ${point.y - 20}px)`;
    const edge = point.y < 90 ? -10 : point.y > innerHeight - 90 ? 10 : 0;
    if (edge) window.scrollBy(0, edge);
    mark((target = over(point.y, i)));
    requestAnimationFrame(follow);
  };
  const onMove = (e) => {
    point = { x: e.clientX, y: e.clientY };
    if (ghost || Math.hypot(point.x - start.x, point.y - start.y) < 5) return;
    ghost = make("div", { className: "ghost" }, make("span", { className: "letter" }, LETTERS[i]),
      make("span", { className: "text" }, shown.answers[i].slice(0, 120)));
    document.body.append(ghost);
    document.body.classList.add("dragging");
    cards[i].classList.add("dragged");
    follow();
  };
  const end = (apply) => {
    for (const [name, handler] of Object.entries(handlers)) removeEventListener(name, handler, true);
    if (!ghost) return;
    ghost.remove();
    ghost = null;
    document.body.classList.remove("dragging");
    cards[i].classList.remove("dragged");
    mark(null);
    if (apply && !busy) drop(i, over(point.y, i));
    focusCard(i);
  };
  const handlers = {
    pointermove: onMove,
    pointerup: (e) => { point = { x: e.clientX, y: e.clientY }; end(true); },
    pointercancel: () => end(false),
    keydown: (e) => { if (e.key === "Escape") { e.stopPropagation(); end(false); } },
  };
  for (const [name, handler] of Object.entries(handlers)) addEventListener(name, handler, true);
  head.setPointerCapture(event.pointerId);
}

// Where a drop at this height goes: onto a place (its middle), before or after one (its edges), or out of the ranking.
function over(y, i) {
  const rows = [...$("places").children];
  const all = groups();
  if (!$("pool-area").hidden && y > $("pool-area").getBoundingClientRect().top) return { row: $("pool-area"), kind: "pool" };
  if (!all.length) return { row: rows[0], kind: "tie", place: 1 };
  for (const [n, row] of rows.entries()) {
    const { top, bottom, height } = row.getBoundingClientRect();
    const edge = Math.min(height * 0.3, 40);
    const [place, members] = all[n];
    if (members.length === 1 && members[0] === i) {
      if (y <= bottom) return y >= top || n === 0 ? null : { row, kind: "before", place };
    } else if (y < top + edge) return { row, kind: "before", place };
    else if (y <= bottom - edge) return { row, kind: "tie", place };
  }
  return { row: rows.at(-1), kind: "after", place: all.at(-1)[0] };
}

function mark(target) {
  for (const row of document.querySelectorAll(".drop-tie, .drop-before, .drop-after, .drop-pool")) {
    row.classList.remove("drop-tie", "drop-before", "drop-after", "drop-pool");
  }
  target?.row.classList.add(`drop-${target.kind}`);
}

function drop(i, target) {
  if (!target) return;
  if (target.kind === "pool") return remove(i);
  const shift = { before: -0.5, tie: 0, after: 0.5 }[target.kind];
  if (shift || draft.ranks[i] !== target.place) change(() => insert(i, target.place + shift), () => describe(i));
}

// --- keys ---------------------------------------------------------------------------------------------------------

function onKey(event) {
  if ($("keys").open || event.isComposing) return;
  const field = event.target.closest?.("textarea, input");
  const working = !$("work").hidden;
  const control = event.ctrlKey || event.metaKey;
  if (field) {
    if (event.key === "Escape" && working) focusCard(current);
    if (event.key === "Enter" && control && working) { event.preventDefault(); save(false); }
    return;
  }
  if (busy || event.altKey || (control && event.key !== "z" && event.key !== "Enter")) return;
  if (event.key === "Enter" && !control && event.target.closest?.("button, a")) return; // it presses that button
  const digit = /^(?:Digit|Numpad)([0-9])$/.exec(event.code)?.[1]; // by position: the same on every layout
  const actions = {
    "?": () => $("keys").showModal(),
    b: () => shown?.back && go(shown.back),
    f: () => shown?.judgement && go(shown.forward),
  };
  if (working) {
    Object.assign(actions, {
      ArrowUp: () => (event.shiftKey ? move(current, -1) : step(-1)),
      ArrowDown: () => (event.shiftKey ? move(current, 1) : step(1)),
      k: () => step(-1),
      j: () => step(1),
      t: () => tie(current),
      Backspace: () => remove(current),
      Delete: () => remove(current),
      Enter: () => save(false),
      s: () => save(true),
      u: undo,
      z: () => control && undo(),
      n: () => $("note").focus(),
      i: () => $("ideal").focus(),
    });
    if (digit && digit !== "0") actions.digit = () => (event.shiftKey ? toggle(current, session.tags[digit - 1]) : place(current, Number(digit), true));
    if (digit === "0") actions.digit = () => remove(current);
  }
  const action = event.key === "?" ? actions["?"] : actions.digit ?? actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function step(by) {
  const order = [...document.querySelectorAll(".card")].map((element) => cards.indexOf(element));
  const next = order[order.indexOf(current) + by];
  if (next !== undefined) focusCard(next);
}

// --- start --------------------------------------------------------------------------------------------------------

async function start() {
  const { ok, data } = await call("session");
  if (!ok) return status(refusal(data), "bad");
  session = data;
  const asked = new URLSearchParams(location.search).get("item"); // a link of the results page
  if (asked) {
    sessionStorage.setItem("item", asked);
    history.replaceState(null, "", "./");
  }
  if (!tab) sessionStorage.setItem("tab", (tab = newId()));
  if (labeller) return locked(() => load(sessionStorage.getItem("item")));
  $("known").hidden = !data.labellers.length;
  $("known-names").replaceChildren(...data.labellers.map((person) =>
    make("button", { type: "button", onclick: () => enter(person.name) }, `${person.name} (${person.judged} of ${person.total})`)));
  show("start");
  $("name").focus();
}

function enter(name) {
  labeller = name.trim();
  if (!labeller) return;
  sessionStorage.setItem("labeller", labeller);
  locked(() => load(sessionStorage.getItem("item")));
}

$("start-form").addEventListener("submit", (event) => { event.preventDefault(); enter($("name").value); });
$("who").addEventListener("click", () => {
  for (const name of ["labeller", "item"]) sessionStorage.removeItem(name);
  location.reload();
});
$("show-keys").addEventListener("click", () => $("keys").showModal());
$("back").addEventListener("click", () => go(shown.back));
$("forward").addEventListener("click", () => go(shown.forward));
$("undo").addEventListener("click", undo);
$("skip").addEventListener("click", () => save(true));
$("save").addEventListener("click", () => save(false));
for (const name of ["note", "ideal"]) {
  $(name).addEventListener("input", () => { draft[name] = $(name).value; touched(); });
}
document.addEventListener("keydown", onKey);

let lastSign = Date.now();
for (const sign of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"]) {
  addEventListener(sign, () => { lastSign = Date.now(); }, { passive: true, capture: true });
}
setInterval(() => {
  if (draft && !busy && !document.hidden && Date.now() - lastSign < IDLE) draft.seconds += 1;
}, 1000);

start();
