"""A stand-in for an OpenAI-compatible server, on this machine: it judges by length, and misbehaves when told to."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def verdict(text: str) -> str:
    """The shortest answer is the best; one with "fish" is irrelevant."""
    shown = re.findall(r"\[\w{6} answer (\w)\]\n(.*?)\n\[\w{6} end\]", text, flags=re.S)
    lengths = sorted({len(answer) for _, answer in shown})
    ranks = {letter: 1 + lengths.index(len(answer)) for letter, answer in shown}
    tags = {letter: ["irrelevant"] * ("fish" in answer) for letter, answer in shown}
    return json.dumps({"ranks": ranks, "tags": tags})


def completion(content, finish="stop", **message) -> bytes:
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()


class Judge(ThreadingHTTPServer):
    """`behave(handler, number, text)` may answer request `number` itself and return True; else a right reply follows."""

    daemon_threads = True

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.asked, self.keys, self.times, self.lock = behave, [], [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # connections that break are what is tested


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.times.append(time.monotonic())
            self.server.keys.append(self.headers.get("Authorization"))
        if not (self.server.behave and self.server.behave(self, number, text)):
            self.reply(200, completion(verdict(text)))

    def reply(self, status, body: bytes, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(behave=None):
    server = Judge(behave)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
