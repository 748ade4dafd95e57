"""The ranking page under attack: nothing sent to it gives 500, what it accepts can be read back, the store is never
lost.
"""

import contextlib
import json
import re
import sqlite3
import string
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import __main__
from pipelines.data import rows as data_rows
from pipelines.errors import SetupError
from pipelines.feedback import results, store
from pipelines.feedback.server import create_app
from pipelines.feedback.store import Store, StoreError

pytest.importorskip("fastapi", reason="the ranking page needs the extra `feedback`")
from starlette.testclient import TestClient  # noqa: E402

HALF = "\ud83d"
ROWS = [
    {"prompt": "1 + 1?", "completions": ["2", "two, silly", "3"], "models": ["policy", "sft", "sft"], "id": "sum"},
    {
        "prompt": f"half {HALF}",
        "completions": ["a\x00b", f"c{HALF}", "\u2028d\x85"],
        "models": [f"m{HALF}", "sft", "sft"],
    },
]
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@contextlib.contextmanager
def served(path, rows=ROWS, overlap=1.0):
    """`(client, store, keys)`; an error in the server is an answer 500, as in life."""
    judgements = Store(path)
    keys = judgements.add(rows)
    app = create_app(judgements, keys, judgements.add_tags([]), overlap)
    address = f"http://127.0.0.1:8765/{judgements.token}/"
    with TestClient(app, base_url=address, raise_server_exceptions=False) as client:
        yield client, judgements, keys


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with served(tmp_path_factory.mktemp("page") / "x.rankings.db") as found:
        yield found


def body(key, number=1, **more):
    given_ = {"ranks": [1, 2, 3], "tags": [[], [], []], "labeller": "Ann"} | more
    return {"id": f"judgement-{number}", "item": key, **given_}


def post(client, value):
    """A body as text, so that NaN, Infinity and half surrogates travel as an attacker would send them."""
    headers = {"Content-Type": "application/json"}
    return client.post("api/judgement", content=json.dumps(value).encode(), headers=headers)


def check_readable(client, judgements):
    """Everything that reads the store works, and the rows are what training reads."""
    for path in ("api/session", "api/results", "export/rankings.jsonl", "export/ideal.jsonl", "results", ""):
        assert client.get(path).status_code == 200, path
    for path, kind in (("export/rankings.jsonl", "rankings"), ("export/ideal.jsonl", "sft")):
        for line in client.get(path).content.decode().split("\n")[:-1]:
            data_rows.normalise(json.loads(line), kind)
    json.dumps(results.summary(list(judgements.judgements()), []), allow_nan=False)


# Any text, half surrogates too; any number, NaN and Infinity too.
text = st.text(st.characters(), max_size=20) | st.sampled_from([HALF, "", " ", "\x00", "Ann\n", "é" * 64, "x" * 65])
numbers = st.integers() | st.floats() | st.booleans() | st.sampled_from([10**400, -1, 0, 1, 9, 10])
anything = st.recursive(
    st.none() | numbers | text, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3)
)
ids = st.text(string.ascii_letters + string.digits + "-", min_size=8, max_size=64)


@quick
@given(st.data())
def test_no_judgement_gives_500_and_what_is_accepted_can_be_read_back(page, data):
    client, judgements, keys = page
    good = {
        "id": data.draw(ids),
        "item": data.draw(st.sampled_from(keys)),
        "labeller": data.draw(st.just("Ann") | text),
        "ranks": data.draw(st.none() | st.lists(st.integers(1, 9), min_size=3, max_size=3)),
        "tags": data.draw(st.lists(st.lists(st.sampled_from(store.TAGS)), min_size=3, max_size=3)),
        "note": data.draw(text),
        "ideal": data.draw(text),
        "seconds": data.draw(st.floats(0, 1e7)),
    }
    for field in data.draw(st.lists(st.sampled_from([*good, "replaces", "more"]), max_size=2)):
        good[field] = data.draw(anything)
    before = len(list(judgements.judgements()))
    reply = post(client, good)
    assert reply.status_code < 500, reply.text
    if reply.status_code == 200:
        shown = client.get("api/item", params={"labeller": good["labeller"], "tab": "tab-tab-1", "item": good["item"]})
        assert shown.json()["judgement"]["note"] == good["note"]
    assert len(list(judgements.judgements())) >= before
    check_readable(client, judgements)


@quick
@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_no_body_gives_500(page, raw):
    client, judgements, _ = page
    assert client.post("api/judgement", content=raw, headers={"Content-Type": "application/json"}).status_code < 500
    assert client.post("api/judgement", content=raw).status_code < 500


@quick
@given(st.dictionaries(st.sampled_from(["labeller", "tab", "item", "x"]), st.text(max_size=80)))
def test_no_question_gives_500(page, query):
    with contextlib.suppress(UnicodeEncodeError):  # such a query cannot be sent
        assert page[0].get("api/item", params=query).status_code < 500


@pytest.mark.parametrize(
    "host", ["[::1", "[", "]", "a]b", "127.0.0.1:x", "[::g]", "", "\xff", "127.0.0.1@evil.example", "//x"]
)
@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_a_malformed_address_is_refused(page, header, host):
    reply = page[0].get("api/session", headers={header: host.encode("latin-1")})
    assert reply.status_code == (200 if (header, host) == ("Host", "127.0.0.1:x") else 403)


@pytest.mark.parametrize("path", ["*", "", "/", "//", "/\ud83d", "/%00", "/é", "/..", "/" + "x" * 5000])
def test_no_path_gives_500(page, path):
    """Asked below HTTP: a client would mend these."""
    import anyio

    sent, app = [], page[0].app

    async def call():
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": b"/",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1")],
            "http_version": "1.1",
            "scheme": "http",
        }

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    anyio.run(call)
    assert sent[0]["status"] == 403


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), -1, 1e9, "5", True, None])
def test_seconds_are_a_length_of_time(page, wrong):
    client, _, keys = page
    assert post(client, body(keys[0], seconds=wrong)).status_code == 422


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": [True, 2, 3]},
        {"ranks": ["1", 2, 3]},
        {"ranks": [1, 2, 10]},
        {"note": 1},
        {"labeller": "A\nB"},
        {"labeller": HALF},
        {"note": HALF},
        {"item": "x" * 20},
        {"ranks": [1.5, 2, 3]},
    ],
)
def test_types_are_not_stretched(page, wrong):
    client, _, keys = page
    assert post(client, body(keys[0], **wrong)).status_code == 422


def test_a_body_without_end_is_not_read(page):
    client = page[0]
    assert client.post("api/judgement", content=iter([b"x" * 10])).status_code == 413  # chunked: no length
    assert client.post("api/judgement", content=b"x" * 4_000_001).status_code == 413


def test_half_a_surrogate_in_an_answer_blocks_nothing(tmp_path):
    with served(tmp_path / "x.rankings.db") as (client, judgements, keys):
        asked = lambda **more: client.get("api/item", params={"labeller": "Ann", "tab": "tab-tab-1", **more})
        assert f"c{HALF}" in asked(item=keys[1]).json()["answers"]
        for number, key in enumerate(keys):
            assert asked().json()["item"] == key
            assert post(client, body(key, number)).status_code == 200
        check_readable(client, judgements)
        target = tmp_path / "out.jsonl"
        assert __main__.main(["rank", "-", "--store", str(judgements.path), "--export", str(target)]) == 0
        assert [json.loads(line)["completions"] for line in target.read_text().split("\n")[:-1]] == [
            row["completions"] for row in ROWS
        ]


def test_what_older_versions_stored_can_be_read(tmp_path):
    with served(tmp_path / "x.rankings.db") as (client, judgements, keys):
        assert post(client, body(keys[0])).status_code == 200
        with sqlite3.connect(judgements.path) as db:
            db.execute("UPDATE judgements SET seconds = 9e999")  # Infinity was accepted once
        check_readable(client, judgements)
        assert client.get("api/results").json()["labellers"][0]["seconds"] is None


# --- the file ----------------------------------------------------------------------------------------------------


def gone(path):
    path.rename(path.with_suffix(".away"))


def emptied(path):
    gone(path)
    path.write_bytes(b"")


def a_text(path):
    gone(path)
    path.write_text("no database " * 200)


def of_something_else(path):
    gone(path)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE photos (name TEXT)")


def another_store(path):
    gone(path)
    Store(path).add(ROWS)


def torn(path):
    gone(path)
    path.write_bytes(path.with_suffix(".away").read_bytes()[:5000])


HARM = {
    gone: "is gone",
    emptied: r"is empty \(0 bytes\)",
    a_text: "not a database",
    of_something_else: r"something else \(it holds photos\)",
    another_store: "another store",
    torn: "",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_store_that_is_not_what_it_was_is_reported_and_nothing_is_lost(tmp_path, caplog, harm):
    path = tmp_path / "x.rankings.db"
    with served(path) as (client, judgements, keys):
        assert post(client, body(keys[0])).status_code == 200
        harm(path)
        for _ in range(2):
            late = post(client, body(keys[1], 2))
            assert late.status_code == 503
        assert re.search(HARM[harm], late.json()["detail"]) and str(path) in late.json()["detail"]
        for address in (
            "api/session",
            "api/results",
            "export/rankings.jsonl",
            f"api/item?labeller=Ann&tab=tab-tab-1&item={keys[0]}",
        ):
            assert client.get(address).status_code == 503
        assert client.get("").status_code == 200  # the page itself
        assert sum(str(path) in record.getMessage() for record in caplog.records) <= 2  # once, not at every try
        assert re.search(HARM[harm], caplog.text)
        path.with_suffix(".away").replace(path)  # the owner puts it back
        assert post(client, body(keys[1], 2)).status_code == 200
        assert len(list(judgements.rankings())) == 2 and "can be used again" in caplog.text


@pytest.mark.parametrize("harm", [h for h in HARM if h not in (gone, another_store)])
def test_a_wrong_file_is_refused_at_the_start_and_left_as_it_is(tmp_path, write, capsys, harm):
    path = tmp_path / "x.rankings.db"
    Store(path).add(ROWS)
    harm(path)
    before = path.read_bytes()
    source = write("x.jsonl", ROWS[:1])
    for more in (["--no-browser", "--port", "0"], ["--export", str(tmp_path / "out.jsonl")]):
        assert __main__.main(["rank", source, "--store", str(path), *more]) == 2
        assert str(path) in capsys.readouterr().err
    assert path.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_a_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SCHEMA", store.SCHEMA + "no SQL;")
    with pytest.raises(StoreError, match="cannot be made"):
        Store(tmp_path / "x.db")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(StoreError, match="cannot be made"):
        Store(tmp_path / "no" / "folder" / "x.db")


def test_two_servers_that_make_a_store_at_once_share_it(tmp_path):
    tokens, begin = [], threading.Barrier(4)

    def make():
        begin.wait()
        tokens.append(Store(tmp_path / "x.db").token)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 4 and len(set(tokens)) == 1 and [p.name for p in tmp_path.iterdir()] == ["x.db"]


def test_a_locked_database_holds_up_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 1.0)
    path = tmp_path / "x.rankings.db"
    with served(path) as (client, judgements, keys):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            replies = []
            waiting = [
                threading.Thread(target=lambda n=n: replies.append(post(client, body(keys[0], 1)))) for n in range(8)
            ]
            for thread in waiting:
                thread.start()
            begun = time.monotonic()
            assert client.get("").status_code == client.get("static/page.js").status_code == 200
            assert time.monotonic() - begun < 0.9  # not one second of waiting for the database
            for thread in waiting:
                thread.join()
            assert {reply.status_code for reply in replies} == {503} and "locked" in replies[0].text
            other.execute("ROLLBACK")
        assert post(client, body(keys[0], 1)).status_code == 200 and len(list(judgements.rankings())) == 1


def test_a_tag_that_no_judgement_could_have_is_refused(tmp_path):
    for tag in ("x" * 65, "a\nb", HALF):
        with pytest.raises(SetupError, match="--tags"):
            Store(tmp_path / "x.db").add_tags([tag])


def test_an_odd_path_is_a_path(tmp_path):
    path = tmp_path / "a?b=c#d %41.db"
    assert Store(path).token == Store(path).token and path.is_file()
