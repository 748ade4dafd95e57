"""The ranking page below the browser: judgements are stored once and corrected, served blind, exported and counted."""

import json
import math
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from scipy import stats

from pipelines import __main__
from pipelines.commands import rank
from pipelines.data import mixing
from pipelines.errors import SetupError
from pipelines.feedback import results
from pipelines.feedback.server import STATIC, create_app
from pipelines.feedback.store import Conflict, Judgement, Store, dense, read_rows
from pipelines.recipe import data_checks

ROWS = [
    {"prompt": "1 + 1?", "completions": ["2", "two, silly", "3"], "models": ["policy", "sft", "sft"], "id": "sum"},
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completions": ["Hello", "No", "Hello"],
        "models": ["sft", "base", "policy"],
    },
    {"prompt": "Bye", "completions": ["Bye", "Never"]},
]


def judged(item, number=1, labeller="Ann", **more):
    """A judgement of three answers."""
    given = {"ranks": [1, 2, 3], "tags": [[], [], []]} | more
    return Judgement(id=f"judgement-{number}", item=item, labeller=labeller, **given)


def count(store):
    with store._open() as db:
        return db.execute("SELECT count(*) FROM judgements").fetchone()[0]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "x.rankings.db")


# --- the store ---------------------------------------------------------------------------------------------------


def test_a_commit_waits_for_the_disk_and_the_file_is_private(store):
    with store._open() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert Store(store.path).token == store.token and len(store.token) == 32


def test_the_same_judgement_twice_is_stored_once(store):
    key = store.add(ROWS)[0]
    store.save(judged(key))
    store.save(judged(key, seconds=9))  # the page tries again after a lost reply
    assert count(store) == 1
    with pytest.raises(Conflict) as conflict:
        store.save(judged(key, ranks=[3, 2, 1]))  # the same id for something else
    assert conflict.value.current["ranks"] == [1, 2, 3]


def test_a_correction_replaces_and_the_history_stays(store):
    key, other, _ = store.add(ROWS)
    store.save(judged(key, 1))
    store.save(judged(other, 2))
    store.save(judged(key, 3, replaces="judgement-1", ranks=[2, 1, 1], note="better"))
    assert store.current(key, "Ann")["ranks"] == [2, 1, 1]
    assert [j["item"] for j in store.history("Ann")] == [key, other]  # the order of the first judgements
    assert count(store) == 3
    store.save(judged(key, 1))  # a late copy of the first one changes nothing
    assert store.current(key, "Ann")["note"] == "better"


def test_two_tabs_cannot_both_judge_or_correct(store):
    key, other, _ = store.add(ROWS)
    store.save(judged(key, 1))
    second = Store(store.path)  # another server on the same file
    with pytest.raises(Conflict) as conflict:
        second.save(judged(key, 2))
    assert conflict.value.current["judgement"] == "judgement-1"
    second.save(judged(key, 3, replaces="judgement-1"))
    with pytest.raises(Conflict):
        store.save(judged(key, 4, replaces="judgement-1"))
    with pytest.raises(Conflict):  # a correction of another prompt's judgement
        store.save(judged(other, 5, replaces="judgement-3"))
    store.save(judged(key, 6, labeller="Ben"))  # each labeller has their own
    assert len(list(store.rankings())) == 2


def test_rankings_of_a_file_are_taken_in_once_and_compared(store, write, tmp_path, capsys):
    key, _, bye = store.add(ROWS)
    store.save(judged(key, 1, ranks=[1, 2, 3]))
    rows = [
        {**ROWS[0], "completions": ROWS[0]["completions"][::-1], "ranks": [7, 4, 1], "tags": [["odd"], [], []]},
        {**ROWS[2], "ranks": [1, 1]},
        {"prompt": "other", "completions": ["a", "b"], "ranks": [1, 2]},
    ]
    rows = [{**{k: r[k] for k in ("prompt", "completions", "ranks", "tags") if k in r}, "labeller": "m"} for r in rows]
    command = ["rank", write("rows.jsonl", ROWS), "--store", str(store.path), "--import", write("j.jsonl", rows)]
    for _ in range(2):
        assert __main__.main(command) == 0
        assert "2 rankings" in capsys.readouterr().out
    assert store.current(key, "m")["ranks"] == [1, 2, 3] and store.current(key, "m")["tags"] == [[], [], ["odd"]]
    assert store.current(bye, "m")["ranks"] == [1, 1] and count(store) == 3
    [pair] = results.summary(list(store.judgements()), [])["agreement"]["pairs"]
    assert pair["labellers"] == ["Ann", "m"] and pair["tau"] == 1
    write("j.jsonl", [{**rows[1], "ranks": [2, 1]}])
    assert __main__.main(command) == 0 and store.current(bye, "m")["ranks"] == [2, 1]
    write("j.jsonl", [{**rows[1], "labeller": "x" * 65}])
    assert __main__.main(command) == 2 and "j.jsonl:1: labeller" in capsys.readouterr().err
    write("j.jsonl", [{"prompt": "p"}])
    assert __main__.main(command) == 2


def test_exports_are_what_reward_and_sft_read(store, tmp_path, capsys):
    sums, _, bye = store.add(ROWS)
    store.save(judged(sums, 1, ranks=[1, 4, 9], tags=[[], ["inappropriate"], ["inaccurate"]], note="easy"))
    store.save(judged(bye, 2, ranks=None, tags=[[], []], ideal=" Goodbye. "))
    assert __main__.main(["rank", "-", "--store", str(store.path), "--export", str(tmp_path / "r.jsonl")]) == 0
    assert "1 rankings" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in open(tmp_path / "r.jsonl")]
    assert row == {
        "prompt": "1 + 1?",
        "completions": ["2", "two, silly", "3"],
        "ranks": [1, 2, 3],
        "labeller": "Ann",
        "tags": [[], ["inappropriate"], ["inaccurate"]],
        "note": "easy",
        "models": ["policy", "sft", "sft"],
        "id": "sum",
    }
    for name, kind in (("r.jsonl", "rankings"), ("r.ideal.jsonl", "sft")):
        section = {"train": str(tmp_path / name)}
        assert not list(data_checks.problems(section, kind, None, read_rows=True))
    (ideal,) = mixing.stream({"train": str(tmp_path / "r.ideal.jsonl")}, "train", "sft", seed=0)
    assert (ideal["prompt"], ideal["completion"]) == ("Bye", "Goodbye.")


def test_rankings_go_straight_into_datasets(store):
    from datasets import Dataset

    store.save(judged(store.add(ROWS)[0]))
    assert Dataset.from_list(list(store.rankings()))[0]["ranks"] == [1, 2, 3]


def test_gaps_are_closed():
    assert dense([1, 4, 4, 9]) == [1, 2, 2, 3]


def test_broken_rows_are_named(write):
    path = write(
        "x.jsonl",
        [
            ROWS[0],
            {"prompt": "a"},
            {"prompt": "a", "completions": ["x", "x"]},
            {"prompt": "a", "completions": ["x", " "]},
            {"prompt": "a", "completions": ["x", "y"], "models": ["m"]},
            {"prompt": "a", "completions": list("0123456789")},
        ],
    )
    with pytest.raises(SetupError) as error:
        read_rows([path])
    for part in (
        ":2: no list `completions`",
        ":3: all completions are the same",
        ":4: completions is empty",
        ":5: models must be a list of 2",
        ":6: 10 completions",
    ):
        assert part in str(error.value)


def test_a_stage_folder_stands_for_its_samples(write, tmp_path):
    write("run/sample/samples.jsonl", ROWS)
    assert len(read_rows([str(tmp_path / "run/sample")])) == 3
    with pytest.raises(SetupError, match=r"no samples\.jsonl"):
        read_rows([str(tmp_path / "run")])
    assert rank._beside(tmp_path / "run/sample") == tmp_path / "run/sample/samples.rankings.db"
    assert rank._beside(tmp_path / "a.jsonl.gz") == tmp_path / "a.rankings.db"


def test_mistakes_are_said(write, tmp_path, capsys, monkeypatch):
    path = write("x.jsonl", ROWS)
    assert __main__.main(["rank", path, "--export", str(tmp_path / "y.jsonl")]) == 2
    assert "no judgements yet" in capsys.readouterr().err
    assert __main__.main(["rank", path, "--store", write("no.db", "this is not a database, it is a text" * 50)]) == 2
    assert "file is not a database" in capsys.readouterr().err
    taken = rank._listen(0)
    assert __main__.main(["rank", path, "--no-browser", "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert __main__.main(["rank", path]) == 2
    assert "pip install -e '.[feedback]'" in capsys.readouterr().err


# --- over HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(store):
    pytest.importorskip("fastapi", reason="the ranking page needs the extra `feedback`")
    from starlette.testclient import TestClient

    app = create_app(store, store.add(ROWS), store.add_tags(["too_long"]))
    with TestClient(app, base_url=f"http://127.0.0.1:8765/{store.token}/") as client:
        yield client


def ask(client, labeller="Ann", tab="tab-tab-1", **more):
    answer = client.get("api/item", params={"labeller": labeller, "tab": tab, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def send(client, item, number=1, labeller="Ann", **more):
    given = {"ranks": [1, 2, 3], "tags": [[], [], []]} | more
    return client.post("api/judgement", json={"id": f"judgement-{number}", "item": item, "labeller": labeller, **given})


def test_answers_are_blind_and_shuffled_for_each_labeller(client, store):
    orders, key = set(), store.add(ROWS)[0]
    for n in range(12):
        shown = ask(client, labeller=f"labeller {n}", item=key)
        assert sorted(shown["answers"]) == ["2", "3", "two, silly"]
        assert shown == ask(client, labeller=f"labeller {n}", item=key)  # the same after a reload
        assert "policy" not in json.dumps(shown) and "sft" not in json.dumps(shown)
        orders.add(tuple(shown["answers"]))
    assert len(orders) > 2


def test_ranks_and_tags_come_back_to_the_answers_they_were_given(client, store):
    for n in range(6):  # six labellers, six orders
        shown = ask(client, labeller=f"labeller {n}", item=store.add(ROWS)[0])
        rank_of, tag_of = {"2": 1, "two, silly": 2, "3": 2}, {"2": [], "two, silly": ["too_long"], "3": ["inaccurate"]}
        reply = send(
            client,
            shown["item"],
            n,
            f"labeller {n}",
            ranks=[rank_of[a] for a in shown["answers"]],
            tags=[tag_of[a] for a in shown["answers"]],
        )
        assert reply.status_code == 200, reply.text
        again = ask(client, labeller=f"labeller {n}", item=shown["item"])["judgement"]
        assert again["ranks"] == [rank_of[a] for a in again_order(client, n, shown["item"])]
        assert again["tags"] == [tag_of[a] for a in shown["answers"]]
    rows = list(store.rankings())
    assert len(rows) == 6
    assert all(r["ranks"] == [1, 2, 2] and r["tags"] == [[], ["too_long"], ["inaccurate"]] for r in rows)


def again_order(client, n, item):
    return ask(client, labeller=f"labeller {n}", item=item)["answers"]


def test_an_answer_of_two_models_is_shown_once_and_ranked_for_both(client, store):
    shown = ask(client, item=store.add(ROWS)[1])
    assert sorted(shown["answers"]) == ["Hello", "No"]
    ranks = [{"Hello": 1, "No": 2}[a] for a in shown["answers"]]
    assert send(client, shown["item"], ranks=ranks, tags=[[], []]).status_code == 200
    assert next(store.rankings())["ranks"] == [1, 2, 1]


def test_every_prompt_once_then_done_and_back(client, store):
    keys, seen = store.add(ROWS), []
    for n, key in enumerate(keys):
        shown = ask(client)
        assert shown["item"] == key and shown["progress"]["judged"] == n
        assert shown["back"] == (keys[n - 1] if n else None)
        seen.append(key)
        k = len(shown["answers"])
        ranks = None if n == 1 else [1] * k
        assert send(client, key, n, ranks=ranks, tags=[[]] * k, seconds=30).json()["progress"]["judged"] == n + 1
    end = ask(client)
    assert end["item"] is None and end["back"] == keys[-1]
    assert end["progress"] == {"total": 3, "judged": 3, "skipped": 1, "an_hour": None}
    middle = ask(client, item=keys[1])
    assert (middle["back"], middle["forward"]) == (keys[0], keys[2]) and middle["judgement"]["ranks"] is None
    assert ask(client, labeller="Ben")["item"] == keys[1]  # who comes second begins half way


def test_two_tabs_of_a_labeller_get_different_prompts(client, store):
    keys = store.add(ROWS)
    assert [ask(client, tab=f"tab-tab-{n}")["item"] for n in (1, 2, 3)] == keys
    assert ask(client, tab="tab-tab-1")["item"] == keys[0]  # a reload
    assert ask(client, tab="tab-tab-9")["item"] == keys[0]  # none is left: better twice than not at all
    send(client, keys[0])
    late = send(client, keys[0], 2, ranks=[3, 2, 1])
    assert late.status_code == 409 and late.json()["judgement"]["id"] == "judgement-1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": [1, 2]},
        {"ranks": [0, 1, 2]},
        {"tags": [["nonsense"], [], []]},
        {"tags": [[]]},
        {"surprise": 1},
        {"labeller": " "},
        {"note": "x" * 100_001},
    ],
)
def test_what_makes_no_sense_is_refused(client, store, wrong):
    assert send(client, store.add(ROWS)[0], **wrong).status_code == 422
    assert not list(store.judgements())


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:8765"},  # a name rebound to this machine
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_sites_are_refused(client, headers):
    assert client.get("api/session", headers=headers).status_code == 403
    assert client.post("api/judgement", json={}, headers=headers).status_code == 403


def test_nothing_without_the_token(client, store):
    for path in ("/", "/results", "/static/page.js", "/docs", "/openapi.json", f"/{store.token[:-1]}x/", "//", "/%00/"):
        assert client.get(f"http://127.0.0.1:8765{path}").status_code == 403, path
    page = client.get("")
    assert page.status_code == 200 and "Rank the answers" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert client.get("", headers={"Origin": "http://127.0.0.1:8765"}).status_code == 200
    assert client.get("static/../../store.py").status_code in (403, 404)


def test_the_page_loads_nothing_from_elsewhere():

    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "innerHTML" not in text and "insertAdjacentHTML" not in text, file


def test_results_and_downloads(client, store):
    key = store.add(ROWS)[0]
    for n, name in enumerate(("Ann", "Ben")):
        send(client, key, n, name, ranks=[1, 1, 2], ideal="2.")
    found = client.get("api/results").json()
    assert (found["prompts"], found["rankings"], found["ideals"]) == (1, 2, 2)
    assert {m["name"] for m in found["models"]} == {"policy", "sft"}
    lines = client.get("export/rankings.jsonl").text.splitlines()
    assert [json.loads(line) for line in lines] == list(store.rankings())
    assert len(client.get("export/ideal.jsonl").text.splitlines()) == 2


# --- results -----------------------------------------------------------------------------------------------------


def test_kendall_tau_b_is_scipys():
    assert results.kendall_tau_b([1, 2, 3], [1, 2, 3]) == 1 and results.kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1
    # of 3 pairs x decides 3, y decides 2, both the same way: 2 / sqrt(3 * 2)
    assert results.kendall_tau_b([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / math.sqrt(6))
    assert results.kendall_tau_b([1, 1, 1], [1, 2, 3]) is None
    chance = np.random.default_rng(0)
    for _ in range(20):
        x, y = chance.integers(0, 4, (2, 7)).tolist()
        assert results.kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_krippendorffs_own_example():
    # Krippendorff (2011), section C: four observers, twelve units; ordinal alpha 0.815
    unknown = None
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, unknown, unknown, unknown],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, unknown, 3],
        [unknown, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, unknown],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, unknown],
    ]
    units = [[v for v in unit if v is not unknown] for unit in zip(*observers)]
    assert results.krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)
    assert results.krippendorff_alpha([[1, 1], [2, 2]]) == 1
    assert results.krippendorff_alpha([[1], [2]]) is None and results.krippendorff_alpha([[1, 1]]) is None


def test_positions_share_ties():
    assert results.positions([1, 2, 3]) == [0, 0.5, 1]
    assert results.positions([1, 1, 2, 3]) == pytest.approx([1 / 6, 1 / 6, 2 / 3, 1])
    assert results.positions([1, 1]) == [0.5, 0.5]


def test_bradley_terry_closed_form_and_fixed_point():
    two = results.bradley_terry(np.array([[0, 3.0], [1, 0]]))
    assert two[0] - two[1] == pytest.approx(math.log(3)) and two.sum() == pytest.approx(0)
    assert results.elo_scale(results.bradley_terry(np.array([[0, 10.0], [1, 0]]))) == pytest.approx([1200, 800])
    # at the maximum of the likelihood every model wins as often as expected
    wins = np.random.default_rng(0).integers(1, 30, (5, 4, 4)).astype(float)
    s = results.bradley_terry(wins)
    wins *= 1 - np.eye(4)
    expected = (wins + wins.swapaxes(1, 2)) / (1 + np.exp(s[:, None, :] - s[:, :, None]))
    assert expected.sum(2) == pytest.approx(wins.sum(2), rel=1e-6)


def ranking(item, ranks, models, labeller="Ann", tags=None):
    more = {"seconds": 10.0, "ideal": "", "tags": tags or [[] for _ in ranks], "prompt": "which?"}
    more["completions"] = [f"answer {n}" for n in range(len(ranks))]
    return {"item": item, "labeller": labeller, "ranks": ranks, "models": models, **more}


def test_model_comparison_counts_pairs_between_models():
    found = results.summary(
        [
            ranking("a", [1, 2, 3], ["new", "old", "old"], tags=[[], ["x"], []]),  # new wins 2
            ranking("b", [1, 1], ["new", "old"]),  # a tie: half
            ranking("c", [2, 1], ["new", "old"]),  # old wins
        ],
        ["x"],
    )
    new, old = found["models"]
    assert (new["name"], new["win_rate"], old["win_rate"]) == ("new", 2.5 / 4, 1.5 / 4)
    assert new["against"] == {"old": 2.5 / 4}
    # Elo with the unjudged tie: 3 to 2
    assert new["elo"] - old["elo"] == pytest.approx(400 * math.log10(3 / 2))
    assert new["elo_interval"][0] < new["elo"] < new["elo_interval"][1]
    assert old["tags"] == {"x": 0.25} and found["tags"] == {"x": 1 / 7}


def test_intervals_cover_and_narrow():
    chance = np.random.default_rng(1)

    def width(prompts):
        rows = [
            ranking(n, [1, 2] if better else [2, 1], ["new", "old"])
            for n, better in enumerate(chance.random(prompts) < 0.7)
        ]
        low, high = results.summary(rows, [])["models"][0]["win_rate_interval"]
        assert low < 0.7 < high
        return high - low

    assert width(400) == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 400), rel=0.15)


def test_agreement_between_labellers():
    rows = [ranking(n, [1, 2, 3], None, "Ann") for n in range(4)]
    rows += [ranking(n, [1, 2, 3] if n < 3 else [3, 2, 1], None, "Ben") for n in range(4)]
    rows += [ranking(9, [1, 2, 3], None, "Cleo")]
    found = results.summary(rows, [])
    (pair,) = found["agreement"]["pairs"]  # Cleo shares no prompt
    assert pair["labellers"] == ["Ann", "Ben"] and pair["prompts"] == 4
    assert pair["tau"] == 0.5 and pair["same_order"] == 0.75
    assert 0 < found["agreement"]["alpha"] < 1 and found["models"] == []


def test_nothing_judged_is_no_error():
    found = results.summary([], ["x"])
    assert found["rankings"] == 0 and found["agreement"] == {"pairs": [], "alpha": None} and found["tags"] == {}


def test_a_killed_server_has_everything_and_comes_back_at_the_same_address(write, request):
    pytest.importorskip("uvicorn", reason="the ranking page needs the extra `feedback`")
    free = rank._listen(0)
    port = free.getsockname()[1]
    free.close()
    command = [sys.executable, "-m", "pipelines", "rank", write("x.jsonl", ROWS), "--no-browser", "--port", str(port)]

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        request.addfinalizer(process.kill)
        return process, next(line.strip() for line in process.stdout if "http://" in line)

    def call(path, body=None):
        data = body and json.dumps(body).encode()
        sent = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} if body else {})
        with urllib.request.urlopen(sent, timeout=30) as reply:
            return json.load(reply)

    server, url = start()
    item = call("api/item?labeller=Ann&tab=tab-tab-1")["item"]
    judgement = {"id": "judgement-1", "item": item, "labeller": "Ann", "ranks": [2, 1, 1], "tags": [[], [], []]}
    assert call("api/judgement", judgement)["saved"] == "judgement-1"
    server.kill()  # at once after the reply
    server.wait()
    server, again = start()
    assert again == url
    assert call("api/judgement", judgement)["progress"]["judged"] == 1  # the page cannot know, and sends it again
    assert call(f"api/item?labeller=Ann&tab=tab-tab-1&item={item}")["judgement"]["ranks"] == [2, 1, 1]
    server.send_signal(signal.SIGINT)
    assert "1 rankings so far" in server.communicate(timeout=30)[0] and server.returncode == 0


def test_the_verb_needs_no_torch():
    code = "import sys, pipelines.commands.rank, pipelines.feedback.results, pipelines.feedback.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
