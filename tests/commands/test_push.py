"""Uploading to a stand-in of the hub on loopback: what is sent is the finished stage, in one commit, and
nothing else.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from pipelines import __main__, files
from pipelines.chain.record import finish
from pipelines.commands import push
from pipelines.errors import SetupError
from pipelines.recipe.stage import Stage

ROOT = Path(__file__).parents[2]
WEIGHTS = bytes(range(256)) * 64


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that an upload uses: create, model info, preupload, LFS batch and PUT, commit."""

    def log_message(self, *_):
        pass

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        private = self.server.private.get(self.path.removeprefix("/api/models/"), False)
        self.reply({"id": self.path.removeprefix("/api/models/"), "private": private})

    def do_PUT(self):
        self.server.stored[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply({})

    def do_POST(self):
        server, body, path = self.server, self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            return self.reply({"errors": [], "warnings": []} if isinstance(yaml.safe_load(front), dict) else {}, 200)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in server.private:
                return self.reply({"url": f"{server.address}/{name}", "error": "exists"}, 409)
            server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.reply({"url": f"{server.address}/{name}", "name": name, "id": "1"})
        if "/preupload/" in path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.reply({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{server.address}/lfs/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            server.commits.append([json.loads(line) for line in body.decode().splitlines()])
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self.reply({"commitUrl": f"{server.address}/{name}/commit/abc", "commitOid": "abc", "success": True})
        self.reply({"error": f"unknown {path}"}, 404)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.private, server.stored, server.commits = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stage(tmp_path):
    """A finished sft stage in a run, made by the chain's own `finish`, with a log, an adapter and a critic."""
    run = tmp_path / "run"
    record = {"kind": "sft", "seed": 1, "data": {}, "sections": {"model": {"model_name_or_path": "Qwen/Qwen3-0.6B"}}}
    files.write_json(run / "first" / files.FINISHED, {"record": record})
    sections = {
        "model": {"model_name_or_path": "stage:first"},
        "data": {"train": "owner/answers", "validation": "data/held out: 1.jsonl"},
        "args": {"learning_rate": 2e-5, "note": "yes: # no"},
    }
    stage = Stage("policy", "ppo", run / "policy", sections, 1, ["first"], "recipes/x.yaml")
    folder = stage.folder
    for name in ("logs/events", "adapter/adapter_model.safetensors", "critic/adapter/x", ".part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the hub")
    (folder / "critic" / "model.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{}")
    made_from = {
        "kind": "ppo",
        "seed": 1,
        "sections": sections,
        "parents": {"first": "1"},
        "base": None,
        "data": {
            "owner/answers": {"hub": "owner/answers", "revision": None},
            "data/held out: 1.jsonl": {"sha256": "ab" * 32, "bytes": 7},
        },
    }
    stage.report = {"prompts": {"train": 963, "validation": 100}}
    metrics = {
        "eval_score": 1.5,
        "eval_kl": float("nan"),
        "train_samples_per_second": 9.0,
        "steps": 10,
        "history": [{"loss": 1.0}],
    }
    finish(stage, made_from, metrics, "2026-01-01", 12.0, 2)
    return folder


def command(hub, *argv, token="hf_right"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "push", *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_finished_stage_goes_up_in_one_commit(stage, hub):
    code, out, err = command(hub, stage, "me/policy", "--private")
    assert code == 0, err
    assert out.splitlines()[-1] == f"{hub.address}/me/policy/commit/abc" and hub.private == {"me/policy": True}
    (commit,) = hub.commits
    assert commit[0]["value"]["summary"] == "policy (ppo) of recipes/x.yaml"
    sent = {line["value"]["path"]: line for line in commit[1:]}
    small = ["README.md", "config.json", "history.jsonl", "stage.json", "tokenizer.json"]
    assert sorted(sent) == sorted([*small, "model.safetensors", "critic/model.safetensors"])
    for name in small:
        assert base64.b64decode(sent[name]["value"]["content"]) == (stage / name).read_bytes()
    for name in ("model.safetensors", "critic/model.safetensors"):
        digest = hashlib.sha256((stage / name).read_bytes()).hexdigest()
        assert sent[name]["value"]["oid"] == digest and hub.stored[digest] == (stage / name).read_bytes()


def test_a_dry_run_sends_nothing(stage, hub):
    code, out, _ = command(hub, stage, "me/policy", "--dry-run", "--also", "logs")
    assert code == 0 and "logs/events" in out and "8 files" in out and not hub.private and not hub.commits


def test_what_the_hub_or_the_user_got_wrong_is_said(stage, hub, capsys):
    code, _, err = command(hub, stage, "me/policy", token="hf_wrong")
    assert code == 2 and "hf auth login" in err and "401" in err and "Traceback" not in err
    hub.private["me/open"] = False
    code, _, err = command(hub, stage, "me/open", "--private")
    assert code == 2 and "is public" in err and not hub.commits
    assert command(hub, stage, "me/open")[0] == 0 and len(hub.commits) == 1
    assert __main__.main(["push", str(stage), "a/b/c"]) == 2
    assert "not a hub id" in capsys.readouterr().err


def test_what_is_not_a_finished_stage_is_refused(stage, tmp_path):
    with pytest.raises(SetupError, match="name one of its stages: first, policy"):
        push.files(stage.parent)
    (stage / "config.json").unlink()
    with pytest.raises(SetupError, match="made no model"):
        push.files(stage)
    (stage / files.FINISHED).rename(stage / files.STARTED)
    with pytest.raises(SetupError, match="not finished"):
        push.files(stage)
    with pytest.raises(SetupError, match="no finished stage"):
        push.files(tmp_path)


def test_the_model_card_says_what_the_hub_and_people_want_to_know(stage):
    from huggingface_hub import ModelCard

    text = (stage / "README.md").read_text()
    card = ModelCard(text)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (
        front["pipeline_tag"] == "text-generation"
        and front["library_name"] == "transformers"
        and "ppo" in front["tags"]
    )
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and front["datasets"] == ["owner/answers"]
    (result,) = card.data.eval_results  # the hub's own reading; counts, speeds and NaN are no results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("score", 1.5, "held out: 1.jsonl")
    assert "`first` ← `Qwen/Qwen3-0.6B`" in text and "ab" * 32 in text and "train 963, validation 100" in text
    for heading in ("Data", "Results", "Limits", "How it was made"):
        assert f"\n## {heading}\n" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["args"]["note"] == "yes: # no" and recipe["kind"] == "ppo"
