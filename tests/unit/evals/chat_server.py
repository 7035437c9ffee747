"""A real chat server on this machine, whose answers a test scripts."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mirage_dist.evals.judges.vlm import VisionLanguage

QUICK = {"timeout": 5, "backoff": 0.01, "retries": 2}


def completion(content, finish="stop", **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def continuation(text, finish="stop"):
    """What `/completions` sends."""
    choice = {"index": 0, "finish_reason": finish, "text": text}
    return 200, {}, json.dumps({"object": "text_completion", "choices": [choice]}).encode()


def error(status, message, code=None, **more):
    """As OpenAI's API and those like it report errors."""
    own = {"message": message, "type": "invalid_request_error", "code": code, **more}
    return status, {}, json.dumps({"error": own}).encode()


class Server(ThreadingHTTPServer):
    """Responds by `script(body, earlier requests of it)` -> (status, headers, body), or None for silence.

    Keeps connections open. drops: after each so many requests on a connection it is closed without notice; at once, so
    that the client knows, or, with `late`, only when the next request has arrived on it.
    """

    daemon_threads = True

    def __init__(self, script, drops=0, late=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock, self.now, self.most = script, [], threading.Lock(), 0, 0
        self.drops, self.late, self.connections = drops, late, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def config(self, **more):
        return VisionLanguage(name="vlm", url=self.url, model="m", **{**QUICK, **more})


def rows(count):
    """Answers to judge, numbered."""
    where = {"set": "unsafe", "kind": "unsafe", "attack": "clean", "shot": 0, "category": "", "image": None}
    return [{"key": str(i), "id": str(i), **where, "question": "Q?", "response": f"answer {i}"} for i in range(count)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.served = 0
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served += 1
        if server.drops and server.late and self.served > server.drops:
            self.close_connection = True  # it was dropped; this request has met nobody
            return
        turns = [turn["content"][-1]["text"] for turn in body.get("messages", []) if turn["role"] == "user"]
        text = turns[-1] if turns else body["prompt"]
        with server.lock:
            times = sum(request["text"] == text for request in server.seen)
            request = {"path": self.path, "headers": dict(self.headers), "body": body, "text": text}
            server.seen.append({**request, "time": time.monotonic()})
            server.now += 1
            server.most = max(server.most, server.now)
        answer = server.script(text, times)
        with server.lock:
            server.now -= 1
        if answer is None:
            server.closing.wait(10)
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(content, bytes):
            self.send_header("Content-Length", str(len(content)))
            content = [content]
        else:
            self.send_header("Connection", "close")
        try:
            self.end_headers()
            for part in content:
                self.wfile.write(part)
                self.wfile.flush()
        except OSError:
            self.close_connection = True  # the other side has left, as the test has it
        if server.drops and not server.late and self.served >= server.drops:
            self.close_connection = True

    do_GET = do_POST

    def log_message(self, *_):
        pass
