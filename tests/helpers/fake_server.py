"""Stand in for an inference server: the part of vLLM's protocol that is spoken, with faults.

with FakeServer(write) as fake:
    fake.url
    fake.statuses = [503, 503]       the next requests get these statuses
    fake.raw = b"HTTP/1.1 200 OK"    every request gets these bytes and the connection's end
    fake.changed = lambda path, document: ...    what is answered in a document's place
    fake.hangs = True                no request is answered
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Document = dict[str, Any]


class FakeServer:
    """Serve a base model and adapters by name on a free port of this machine.

    write(body): the answer to a chat completion.
    adapters: {name: folder} of what is loaded.
    requests: (verb, path, headers, JSON body or None) of all that came, in order.
    """

    def __init__(self, write: Callable[[Document], Document] = lambda body: {}, base: str = "base"):
        self.write, self.base = write, base
        self.adapters: dict[str, str] = {}
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.raw: bytes | None = None
        self.changed: Callable[[str, Any], Any] = lambda path, document: document
        self.hangs, self.api_key = False, ""
        self._ended = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (_Handler,), {"fake": self}))
        self._http.daemon_threads = False  # `__exit__` waits for what they still compute
        # a client that has left is no error
        self._http.handle_error = lambda request, address: None
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)

    def wait(self) -> None:
        """Wait for the end of the server."""
        self._ended.wait(60)

    def bodies(self, path: str = "/v1/chat/completions") -> list[Document]:
        """List what was sent to a path."""
        return [body for _, asked, _, body in self.requests if asked == path]

    def answer(self, verb: str, path: str, body: Any) -> tuple[int, Any]:
        """Answer a request -> (status, a document, or words)."""
        if (verb, path) == ("GET", "/health"):
            return 200, ""
        if (verb, path) == ("GET", "/version"):
            return 200, {"version": "0.32.0"}
        if (verb, path) == ("GET", "/v1/models"):
            loaded = [{"id": name, "root": root} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": [{"id": self.base, "root": self.base}, *loaded]}
        if (verb, path) == ("POST", "/v1/load_lora_adapter"):
            return self._load(body["lora_name"], body["lora_path"])
        if (verb, path) == ("POST", "/v1/unload_lora_adapter"):
            name = body["lora_name"]
            if self.adapters.pop(name, None) is None:
                return _refusal(404, f"The lora adapter '{name}' cannot be found.")
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if (verb, path) == ("POST", "/v1/chat/completions"):
            return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: str) -> tuple[int, Any]:
        if name in self.adapters:
            return _refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(folder, "adapter_config.json").is_file():
            return _refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: Document) -> tuple[int, Any]:
        if body["model"] not in (self.base, *self.adapters):
            return _refusal(404, f"The model `{body['model']}` does not exist.")
        if body.get("temperature") == 0 and body.get("n", 1) > 1:
            return _refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        return 200, self.write(body)


def chat_answer(
    body: Document, ids: list[list[int]], logprobs: list[list[float]], prompt_ids: list[int]
) -> Document:
    """Make a whole answer to a chat completion as vLLM writes it, one list of ids a choice.

    Ids and log-probabilities are there where they are asked for, and null elsewhere.
    """
    with_ids, with_logprobs = body.get("return_token_ids"), body.get("logprobs")
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": f"text {i}", "reasoning": None},
            "logprobs": {
                "content": [
                    {"token": f"t{token}", "logprob": logprob, "bytes": [65], "top_logprobs": []}
                    for token, logprob in zip(own, of_tokens, strict=True)
                ]
            }
            if with_logprobs
            else None,
            "finish_reason": "length" if len(own) == body["max_tokens"] else "stop",
            "stop_reason": None,
            "token_ids": own if with_ids else None,
        }
        for i, (own, of_tokens) in enumerate(zip(ids, logprobs, strict=True))
    ]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": choices,
        "usage": {"prompt_tokens": len(prompt_ids), "completion_tokens": sum(map(len, ids))},
        "prompt_logprobs": None,
        "prompt_token_ids": prompt_ids if with_ids else None,
    }


def _refusal(status: int, message: str) -> tuple[int, Document]:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    timeout = 30  # of a client that says nothing

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer("POST", json.loads(content))

    def _answer(self, verb: str, body: Any) -> None:
        fake = self.fake
        fake.requests.append((verb, self.path, dict(self.headers), body))
        self.close_connection = True
        if fake.hangs:
            return fake.wait()
        if fake.raw is not None:
            with suppress(OSError):
                self.wfile.write(fake.raw)
            return
        if fake.api_key and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            return self._send(401, {"error": "Unauthorized"})
        if fake.statuses and (status := fake.statuses.pop(0)) != 200:
            return self._send(*_refusal(status, "not now"))
        status, document = fake.answer(verb, self.path, body)
        self._send(status, fake.changed(self.path, document))

    def _send(self, status: int, document: Any) -> None:
        if isinstance(document, str):
            document = document.encode()
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        with suppress(OSError):  # nobody may wait any longer
            self.send_response(status)
            for name, value in self.fake.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
