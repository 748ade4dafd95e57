"""The ranking page in a real Chromium: keys, dragging, ties, tags, corrections, tabs, lost replies and a
killed server.
"""

import json
import shutil
import sqlite3
import subprocess
import sys

import pytest

from pipelines.commands import rank

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt install chromium)"),
]
pytest.importorskip("uvicorn", reason="the ranking page needs the extra `feedback`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser-test`")
expect = playwright.expect
expect.set_options(timeout=20_000)  # a busy machine

ATTACK = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
ROWS = [
    {
        "prompt": f"Question {n}: <b>which</b>?",
        "completions": ["good", "fair", f"{ATTACK} {n}", "bad"],
        "models": ["policy", "sft", "sft", "base"],
    }
    for n in range(4)
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Server:
    """`python -m pipelines rank` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, source):
        self.source, self.store = source, source.replace(".jsonl", ".rankings.db")
        free = rank._listen(0)
        self.port = free.getsockname()[1]
        free.close()
        self.start()

    def start(self):
        command = [sys.executable, "-m", "pipelines", "rank", self.source, "--no-browser", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = next(line.strip() for line in self.process.stdout if "http://" in line)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def rows(self):
        """The exported rankings, read from the file by another process."""
        target = self.store.replace(".rankings.db", ".out.jsonl")
        command = [sys.executable, "-m", "pipelines", "rank", self.source, "--export", target]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in open(target)]

    def count(self):
        return sqlite3.connect(self.store).execute("SELECT count(*) FROM judgements").fetchone()[0]


@pytest.fixture
def server(write):
    server = Server(write("answers.jsonl", ROWS))
    yield server
    server.kill()


@pytest.fixture
def opened(browser, server):
    """`opened(name)` opens the page as a labeller; `opened(name, other)` in another tab of that one's browser."""
    contexts, trouble = [], []

    def open_(name, beside=None, **options):
        context = beside.context if beside else browser.new_context(**options)
        if not beside:
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda r: r.url.startswith((f"http://127.0.0.1:{server.port}/", "data:")) or trouble.append(r.url),
        )
        page.goto(server.url)
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Enter")
        ready(page)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not trouble  # no error in a script, and nothing asked of another server


def ready(page, done=None):
    if done is not None:
        expect(page.locator("#progress-text")).to_contain_text(f"{done} of 4")
    expect(page.locator("#work")).not_to_have_attribute("inert", "")


def letter(page, text):
    """The letter under which the answer that begins with `text` stands."""
    return page.locator(".card", has=page.locator(".text", has_text=text)).locator(".letter").inner_text()


def give(page, **places):
    """Rank by keys alone, in the order A, B, C, D in which the page goes through the answers."""
    by_letter = {letter(page, {"attack": ATTACK}.get(text, text)): place for text, place in places.items()}
    for name in sorted(by_letter):
        page.keyboard.press(str(by_letter[name]))


def select(page, text):
    """Go to an answer by the arrow keys."""
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    while page.locator(".card.current > .text").inner_text() != text:
        page.keyboard.press("ArrowDown")


def grip(page, text):
    box = page.locator(".card", has=page.locator(".text", has_text=text)).locator(".grip").bounding_box()
    return box["x"] + 4, box["y"] + 6


def drag(page, text, to, drop=True):
    page.mouse.move(*grip(page, text))
    page.mouse.down()
    page.mouse.move(to[0] - 30, to[1] - 10, steps=3)
    page.mouse.move(*to, steps=3)
    if drop:
        page.mouse.up()
        page.wait_for_timeout(250)  # the moving of the cards


def row(page, n, part):
    """A point of the n-th place: its upper edge (0), middle (0.5) or lower edge (1)."""
    box = page.locator("#places > li").nth(n).bounding_box()
    return box["x"] + 120, box["y"] + 3 + (box["height"] - 6) * part


def places(page):
    return [
        sorted(text.split(" ")[0][:4] for text in place.locator(".card > .text").all_inner_texts())
        for place in page.locator("#places > .place").all()
    ]


def test_by_keys_alone_and_markup_stays_text(opened, server):
    page = opened("Ann")
    assert page.evaluate("document.activeElement.className").startswith("card")
    expect(page.locator("#prompt")).to_have_text("Question 0: <b>which</b>?")
    expect(page.locator(".card", has_text=ATTACK)).to_have_count(1)
    assert page.locator("main img, main script, main b:not(.number b)").count() == 0
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("4 not ranked yet")
    give(page, good=1, fair=2, attack=2, bad=4)
    expect(page.locator("#hint")).to_contain_text("complete")
    assert places(page) == [["good"], ["<img", "fair"], ["bad"]]
    select(page, "bad")
    page.keyboard.press("Shift+ArrowUp")
    assert places(page) == [["good"], ["bad"], ["<img", "fair"]]
    page.keyboard.press("u")
    assert places(page) == [["good"], ["<img", "fair"], ["bad"]]
    select(page, "bad")
    page.keyboard.press("Shift+Digit1")
    page.keyboard.press("Shift+Digit3")
    page.keyboard.press("Shift+Digit1")  # taken back
    expect(page.locator("#say")).to_contain_text("inappropriate removed from answer")
    page.keyboard.press("t")
    assert places(page) == [["good"], ["<img", "bad", "fair"]]
    page.keyboard.press("t")  # leaves the tie, downwards
    page.keyboard.press("n")
    page.keyboard.type("s, b and 1 are letters here")
    page.keyboard.press("Escape")
    page.keyboard.press("i")
    page.keyboard.type("the best")
    page.keyboard.press("Control+Enter")
    ready(page, 1)
    expect(page.locator("#status")).to_have_text("Saved")
    page.keyboard.press("s")
    ready(page, 2)
    (saved,) = server.rows()
    assert saved["ranks"] == [1, 2, 2, 3] and saved["tags"] == [[], [], [], ["inaccurate"]]
    assert saved["note"] == "s, b and 1 are letters here" and saved["models"] == ROWS[0]["models"]
    assert page.evaluate("window.hacked") is None


def test_by_dragging(opened, server):
    page = opened("Ann", viewport={"width": 1280, "height": 1000})
    drag(page, "fair", row(page, 0, 0.5))  # onto the empty ranking
    drag(page, "bad", row(page, 0, 1))  # below
    drag(page, "good", row(page, 0, 0))  # above
    assert places(page) == [["good"], ["fair"], ["bad"]]
    drag(page, ATTACK, row(page, 1, 0.5))  # onto: a tie
    assert places(page) == [["good"], ["<img", "fair"], ["bad"]]
    drag(page, "bad", row(page, 0, 0), drop=False)
    expect(page.locator("#places > li").first).to_have_class("place drop-before")
    page.keyboard.press("Escape")
    page.mouse.up()
    assert places(page) == [["good"], ["<img", "fair"], ["bad"]]
    drag(page, "fair", row(page, 2, 1))  # out of the tie, to the end
    assert places(page) == [["good"], ["<img"], ["bad"], ["fair"]]
    page.locator("#save").click()
    ready(page, 1)
    assert server.rows()[0]["ranks"] == [1, 4, 2, 3]


def test_by_finger_on_a_phone(opened, server):
    page = opened("Ann", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for text, place in (("good", 1), ("fair", 2), ("bad", 3), (ATTACK, 3)):
        page.locator(".card", has=page.locator(".text", has_text=text)).get_by_role(
            "button", name=str(place), exact=True
        ).tap()
    page.locator(".card", has_text="bad").get_by_role("button", name="irrelevant").tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#save").tap()
    ready(page, 1)
    assert server.rows()[0]["ranks"] == [1, 2, 3, 3] and server.rows()[0]["tags"][3] == ["irrelevant"]
    page.goto(server.url + "results")
    expect(page.get_by_role("heading", name="Labellers")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_back_corrects_and_keeps_the_history(opened, server):
    page = opened("Ann")
    for n in (1, 2):
        give(page, good=1, fair=2, attack=3, bad=4)
        page.keyboard.press("Enter")
        ready(page, n)
    page.keyboard.press("b")
    expect(page.locator("#prompt")).to_contain_text("Question 1")
    page.keyboard.press("b")
    expect(page.locator("#prompt")).to_contain_text("Question 0")
    ready(page)
    assert places(page) == [["good"], ["fair"], ["<img"], ["bad"]]
    give(page, good=4, fair=3, attack=2, bad=1)  # of a complete ranking only the current answer changes …
    page.keyboard.press("u")
    select(page, "bad")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_contain_text("Question 1")  # … and the next one follows
    page.keyboard.press("f")
    expect(page.locator("#prompt")).to_contain_text("Question 2")
    assert server.count() == 3 and len(server.rows()) == 2
    assert server.rows()[0]["ranks"][3] == 1


def test_two_labellers_and_the_results(opened, server):
    ann, ben = opened("Ann"), opened("Ben")
    orders = []
    for page in (ann, ben):
        found = []
        for n in range(1, 5):
            found.append(page.locator(".card > .text").all_inner_texts())
            give(page, good=1, fair=2, attack=3, bad=4)
            page.keyboard.press("Enter")
            ready(page, n)
        orders.append(found)
        expect(page.get_by_role("heading", name="All prompts are done")).to_be_visible()
    assert orders[0] != orders[1]  # each has an order of their own
    rows = server.rows()
    assert len(rows) == 8 and all(r["ranks"] == [1, 2, 3, 4] for r in rows)
    ann.get_by_role("link", name="results").click()
    expect(ann.get_by_role("row", name="Ann and Ben")).to_contain_text("1.00")
    expect(ann.get_by_role("row", name="policy").first).to_contain_text("100 %")


def test_the_server_is_killed_before_saving(opened, server):
    page = opened("Ann")
    give(page, good=1, fair=2, attack=3, bad=4)
    page.keyboard.press("Enter")
    ready(page, 1)
    give(page, good=4, fair=3, attack=2, bad=1)
    server.kill()
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("not saved yet")
    expect(page.locator("#status")).not_to_have_text("Saved")
    server.start()
    ready(page, 2)
    expect(page.locator("#status")).to_have_text("Saved")
    expect(page.locator("#banner")).to_be_hidden()
    assert [r["ranks"] for r in server.rows()] == [[1, 2, 3, 4], [4, 3, 2, 1]] and server.count() == 2


@pytest.mark.parametrize("after", ["try again", "reload"])
def test_the_reply_to_a_saved_judgement_is_lost(opened, server, after):
    page = opened("Ann")
    lost = []

    def lose(route):
        lost.append(route.fetch().status)  # it is saved
        if len(lost) == 1 and after == "try again":
            route.abort()
        elif after == "try again":
            route.continue_()

    page.route("**/api/judgement", lose)
    give(page, good=1, fair=2, attack=3, bad=4)
    page.keyboard.press("Enter")
    if after == "reload":
        while not lost:
            page.wait_for_timeout(20)
        page.reload()
    ready(page, 1)
    expect(page.locator("#prompt")).to_contain_text("Question 1")
    assert lost[0] == 200 and server.count() == 1


def test_a_reload_keeps_what_is_not_saved(opened, server):
    page = opened("Ann")
    page.keyboard.press("1")
    page.keyboard.press("Shift+Digit2")
    page.locator("#note").fill("half way")
    before = places(page), page.locator(".tag[aria-pressed=true]").count()
    page.reload()
    ready(page, 0)
    expect(page.locator("#note")).to_have_value("half way")
    assert (places(page), page.locator(".tag[aria-pressed=true]").count()) == before == (before[0], 1)
    assert server.count() == 0


def test_two_tabs_of_one_labeller(opened, server):
    first = opened("Ann")
    second = opened("Ann", beside=first)
    expect(first.locator("#prompt")).to_contain_text("Question 0")
    expect(second.locator("#prompt")).to_contain_text("Question 1")
    give(first, good=1, fair=2, attack=3, bad=4)
    first.keyboard.press("Enter")
    ready(first, 1)
    expect(first.locator("#prompt")).to_contain_text("Question 2")
    for page in (first, second):  # both correct the same one
        page.reload()
        ready(page, 1)
        page.keyboard.press("b")
        expect(page.locator("#prompt")).to_contain_text("Question 0")
        ready(page)
        page.keyboard.press("0")
    first.keyboard.press("1")
    first.keyboard.press("Enter")
    expect(first.locator("#status")).to_have_text("Saved")
    second.keyboard.press("4")
    second.keyboard.press("Enter")
    expect(second.locator("#status")).to_contain_text("judged in another tab")
    assert server.count() == 2
    second.keyboard.press("Enter")
    expect(second.locator("#status")).to_have_text("Saved")
    assert server.count() == 3 and len(server.rows()) == 1


def test_a_store_that_is_moved_away_is_reported_and_the_work_is_kept(opened, server, tmp_path):
    page = opened("Ann")
    give(page, good=1, fair=2, attack=3, bad=4)
    shutil.move(server.store, tmp_path / "away.db")
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("the store of judgements is gone")
    expect(page.locator("#banner")).to_contain_text("not saved yet")
    shutil.move(tmp_path / "away.db", server.store)
    ready(page, 1)
    expect(page.locator("#status")).to_have_text("Saved")
    assert server.count() == 1


def test_a_prompt_worth_a_second_look_is_opened_from_the_results(opened, server):
    ann, ben = opened("Ann"), opened("Ben", color_scheme="dark")
    expect(ben.locator("#prompt")).to_contain_text("Question 2")  # who comes second begins half way
    ann.keyboard.press("s")
    ready(ann, 1)
    ben.goto(server.url + "results")
    ben.get_by_role("link", name="Question 0").click()
    expect(ben.locator("#prompt")).to_contain_text("Question 0")
    assert ben.url == server.url
