"""A real chat server on this machine, whose answers a test scripts."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mirage_dist.evals.judges.vlm import VisionLanguage

QUICK = {"timeout": 5, "backoff": 0.01, "retries": 2}


def completion(content):
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers by `script(body, times asked this)` -> (status, headers, body), or None: says nothing. Keeps requests."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock, self.now, self.most = script, [], threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def config(self, **more):
        return VisionLanguage(name="vlm", url=self.url, model="m", **{**QUICK, **more})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][1]["content"][-1]["text"]
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
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(content, bytes):
            self.send_header("Content-Length", str(len(content)))
            content = [content]
        self.end_headers()
        try:
            for part in content:
                self.wfile.write(part)
                self.wfile.flush()
        except OSError:
            pass  # the other side has left, as the test has it

    do_GET = do_POST

    def log_message(self, *_):
        pass
