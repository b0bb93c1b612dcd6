"""A chat server on loopback that does what it is told: answers, fails, talks nonsense, or says nothing at all."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What goes over the wire; ``after``: seconds before it does."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0


Behaviour = Callable[[str, int, dict[str, Any]], Reply]  # prompt, how often it was asked before, the whole request


@dataclass
class Seen:
    """What a server saw."""

    url: str = ""
    times: list[float] = field(default_factory=list)
    prompts: Counter[str] = field(default_factory=Counter)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    busy: int = 0
    busiest: int = 0


def completion(text: str | None, *, tokens: tuple[int, int] | None = (10, 2)) -> Reply:
    """An ordinary chat completion."""
    usage = tokens and {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps(body).encode())


def failure(status: int, message: str, **headers: str) -> Reply:
    """An error as such servers word it."""
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), headers)


@contextmanager
def chat_server(behave: Behaviour) -> Iterator[Seen]:
    """Serve until the block ends."""
    seen, lock = Seen(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = request["messages"][0]["content"]
            with lock:
                before = seen.prompts[prompt]
                seen.prompts[prompt] += 1
                seen.times.append(time.monotonic())
                seen.requests.append(request)
                seen.keys.add(self.headers["authorization"])
                seen.busy += 1
                seen.busiest = max(seen.busiest, seen.busy)
            try:
                reply = behave(prompt, before, request)
                time.sleep(reply.after)
            finally:
                with lock:
                    seen.busy -= 1
            try:
                self.send_response(reply.status)
                headers = {"content-type": "application/json", "content-length": str(len(reply.body)), **reply.headers}
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                pass  # who asked has hung up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
