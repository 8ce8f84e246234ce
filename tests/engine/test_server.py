"""Protect what goes to an inference server, and this process from what comes from there.

Run: pytest tests/engine/test_server.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
from functools import partial

import pytest

import engine.server
from engine.server import CANCEL, Cancel, Server, ServerError, ServerGone
from engine.server_address import url_problems
from tests.helpers.fake_server import FakeServer

KEY = "sk-Secret_0123456789"


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def server(fake):
    return Server.of(fake.url, 30)


def answered(content, status="200 OK", headers=""):
    """Make the bytes of an answer that has its length."""
    return (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content
    )


# ---- addresses -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8000/",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1",
        "https://127.255.255.254:1",
        "http://localhost:65535",
        "http://LOCALHOST:8000",
        "http://[::1]:8000",
        "http://[0:0:0:0:0:0:0:1]",
        "http://localhost:8000/behind/a-proxy",
    ],
)
def test_this_machine_is_asked(url):
    assert url_problems(url, allow_remote=False) == []


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org/v1",
        "https://10.0.0.7:8443",
        "https://[2001:db8::1]:8443",
        "https://[::ffff:127.0.0.1]",  # no loopback: an IPv4 address within an IPv6 one
        "https://localhost.example.org",
        "https://gpu_node-3",
        "https://xn--bcher-kva.example",
        "https://128.0.0.1",
    ],
)
def test_another_machine_is_asked_by_https_and_a_flag_alone(url):
    assert url_problems(url, allow_remote=True) == []
    (problem,) = url_problems(url, allow_remote=False)
    assert "images would leave it" in problem and "--allow_remote_server" in problem
    assert "MIMIC-CXR's forbid third parties" in problem
    plain = url.replace("https:", "http:")
    (problem,) = url_problems(plain, allow_remote=True)
    assert "by https alone" in problem and plain in problem
    assert len(url_problems(plain, allow_remote=False)) == 2  # all problems at once


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://127.1:8000", "four decimal numbers"),
        ("http://2130706433", "four decimal numbers"),
        ("http://0x7f000001", "four decimal numbers"),
        ("http://0x7f.0.0.1", "four decimal numbers"),
        ("http://127.0.0.0x1", "four decimal numbers"),
        ("http://0177.0.0.1", "four decimal numbers"),
        ("http://127.0.0.1.:80", "no name of a host"),
        ("http://127.0.0.256", "four decimal numbers"),
        ("http://0.0.0.0:8000", "give 127.0.0.1"),
        ("http://[::]:8000", "give 127.0.0.1"),
        ("https://localhost.", "no name of a host"),
        ("http://[::1%25lo]:8000", "network card"),
        ("http://[fe80::1%eth0]", "network card"),
        ("http://[127.0.0.1]", ""),
        ("http://[::1", ""),
        ("http://::1:8000", "Port"),
        ("http://127.0.0.1:65536", "out of range"),
        ("http://127.0.0.1:0", "from 1 to 65535"),
        ("http://127.0.0.1:", "from 1 to 65535"),
        ("http://127.0.0.1:-1", ""),
        ("http://127.0.0.1:80a", ""),
        ("http://127.0.0.1:8000?key=1", "no ?"),
        ("http://127.0.0.1:8000/#", "no ?"),
        ("http://127.0.0.1:8000/v1/../x", "path"),
        ("http://127.0.0.1:8000/v1/./x", "path"),
        ("http://127.0.0.1:8000//evil", "path"),
        ("http://127.0.0.1:8000/a[b", "path"),
        ("ftp://127.0.0.1", "no address"),
        ("file:///etc/passwd", "no address"),
        ("127.0.0.1:8000", "no address"),
        ("localhost:8000", "no address"),
        ("//127.0.0.1", "no address"),
        ("http:127.0.0.1", "no address"),
        ("http:///x", "no address"),
        ("", "no address"),
        ("http://127.0.0.1 .example.org", "no blanks"),
        ("http://127.0.0.1\t:80", "no blanks"),
        ("http://127.0.0.1\r\nHost: x", "no blanks"),
        ("http://127.0.0.1\0", "no blanks"),
        ("http://127.0.0.1\\.example.org", "no blanks"),
        ("http://lоcalhost:8000", "beyond ASCII"),  # a Cyrillic o
        ("http://127。0。0。1", "beyond ASCII"),
        ("http://１２７.0.0.1", "beyond ASCII"),
        ("http://-host.example.org", "no name"),
        ("http://a..b", "no name"),
        (f"http://{'a' * 64}.org", "no name"),
        ("http://" + "a." * 130 + "org", "no name"),
    ],
)
def test_what_could_be_read_as_another_address_is_refused(url, says):
    for allowed in (False, True):
        (problem,) = url_problems(url, allow_remote=allowed)
        assert says in problem and problem.isprintable() and len(problem) < 700


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:8000",
        f"http://{KEY}@localhost",
        f"https://{KEY}@api.example.org/v1",
        f"http://{KEY}@@127.0.0.1",
        f"http://a b:{KEY}@127.0.0.1",
        f"http://a\n:{KEY}@127.0.0.1",
        f"http://x:{KEY}@[::1",
        f"http://x:{KEY}@127.0.0.1:99999",
        f"{KEY}@127.0.0.1",
    ],
)
def test_a_credential_in_an_address_is_refused_and_not_repeated(url):
    problems = url_problems(url, allow_remote=True)
    assert len(problems) == 1 and KEY not in problems[0] and "***@" in problems[0]


def test_the_rest_of_an_address_is_shown():
    (problem,) = url_problems(f"http://user:{KEY}@127.0.0.1:8000/x", allow_remote=True)
    assert problem.startswith("http://***@127.0.0.1:8000/x holds a credential")


def test_the_address_of_openai_clients_is_the_same_server():
    for start in ("http://localhost:8000", "https://v1", "https://[::1]", "https://a.org/behind"):
        for end in ("", "/", "/v1", "/v1/"):
            assert Server.of(f"{start}{end}", 1).base_url == start


# ---- the key -------------------------------------------------------------------------------------
def test_the_key_is_sent_and_never_shown(fake, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    fake.api_key = KEY
    server = Server.of(fake.url, 30)
    assert server.models() == ["base"]
    assert KEY not in repr(server) and fake.requests[0][2]["Authorization"] == f"Bearer {KEY}"
    fake.api_key = "another"
    with pytest.raises(ServerError, match="401: Unauthorized; the key .* was sent") as raised:
        server.models()
    assert raised.value.status == 401
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ServerError, match="VLLM_API_KEY is not set"):
        Server.of(fake.url, 30).models()


@pytest.mark.parametrize("body", [KEY, f"a{KEY}b" * 20, f'{{"error": {{"message": "{KEY}"}}}}'])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad", "500 Oh", "302 Found"])
def test_a_server_that_says_the_key_back_is_not_quoted_with_it(fake, monkeypatch, status, body):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    fake.raw = answered(body.encode(), status, f"Location: http://x/{KEY}\r\n")
    with pytest.raises(ServerError) as raised:
        Server.of(fake.url, 30).models()
    assert KEY not in str(raised.value)
    try:
        said = Server.of(fake.url, 30).command("/x", {})
    except ServerError as error:
        said = str(error)
    assert said and KEY not in said


@pytest.mark.parametrize("key", [KEY, "a/'\"\\b&c"])
@pytest.mark.parametrize(
    "escaped",
    [
        lambda key: json.dumps(key),
        lambda key: json.dumps(key).replace("/", r"\/"),  # as PHP does
        lambda key: json.dumps(key).replace("&", r"\u0026"),  # as Go does
        lambda key: '"' + "".join(rf"\u{ord(sign):04X}" for sign in key) + '"',
    ],
)
@pytest.mark.parametrize("answer", ["{%s: 1, %s: 2}", "{%s: [1, %s}", '{"version": [%s, %s]}'])
def test_a_key_is_known_by_other_spellings(fake, monkeypatch, answer, escaped, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    spelling = escaped(key)
    fake.raw = answered((answer % (spelling, spelling)).encode())
    server, said = Server.of(fake.url, 30), []
    for ask in (server.models, partial(server.command, "/x", {}), server.version):
        try:
            said.append(str(ask()))
        except ServerError as error:
            said.append(str(error))
    for spelt in (key, repr(key)[1:-1], repr(repr(key))[2:-2], spelling[1:-1]):
        assert spelt not in "".join(said)
    fake.raw = answered(json.dumps({"version": f"1.0-{key}"}).encode())
    assert server.version() == "1.0-***"


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused_without_it(monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ServerError, match="VLLM_API_KEY holds") as raised:
        Server.of("http://localhost", 1)
    assert key not in str(raised.value)


def test_a_blank_key_is_none(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", " ")
    assert Server.of("http://localhost", 1).api_key is None


# ---- what comes ----------------------------------------------------------------------------------
def test_what_a_server_lists(fake, server, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    adapter = {"lora_name": "a", "lora_path": str(tmp_path)}
    assert server.command("/v1/load_lora_adapter", adapter) == (
        "Success: LoRA adapter 'a' added successfully."
    )
    assert server.models() == ["base", "a"] and server.version() == "0.32.0"
    with pytest.raises(ServerError, match="400: .*'a' has already been loaded") as raised:
        server.command("/v1/load_lora_adapter", adapter)
    assert raised.value.status == 400 and not isinstance(raised.value, ServerGone)


def test_what_is_posted_and_how_it_comes_back(fake, server):
    fake.answer = lambda verb, path, body: (200, {"path": path})
    assert server.post("/v1/x", {"a": [1, None]}) == {"path": "/v1/x"}
    assert fake.requests[0][:2] == ("POST", "/v1/x") and fake.requests[0][3] == {"a": [1, None]}
    assert fake.requests[0][2]["Content-Type"] == "application/json"
    assert "Authorization" not in fake.requests[0][2]
    with pytest.raises(ValueError, match="not JSON compliant"):
        server.post("/v1/x", {"a": float("nan")})
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "value, shown",
    [
        ({"a": 1, "b": 2}, "an object of 2"),
        ([1] * 3, "a list of 3"),
        ("é\n", r"'\xe9\n'"),
        (f"x{KEY}x", "'x***x'"),
        ("a" * 200, f"'{'a' * 96}..."),
        (1.5, "1.5"),
        (None, "None"),
    ],
)
def test_a_value_of_an_answer_in_few_characters(value, shown):
    assert Server("http://localhost", 1, KEY).shown(value) == shown


def test_a_server_cannot_be_changed(server):
    with pytest.raises(dataclasses.FrozenInstanceError):
        server.base_url = "http://example.org"


@pytest.mark.parametrize(
    "url, host, port",
    [
        ("http://example.org", "example.org", 80),
        ("https://example.org", "example.org", 443),
        ("http://[::1]", "::1", 80),
        ("https://[2001:db8::2:443]", "2001:db8::2:443", 443),
        ("https://[2001:db8::beef]/v1", "2001:db8::beef", 443),
        ("https://[2001:db8::beef]:8443", "2001:db8::beef", 8443),
        ("https://v1", "v1", 443),
    ],
)
def test_the_host_that_is_written_is_asked_at_its_port_or_the_schemes(monkeypatch, url, host, port):
    asked = []

    def connect(*request):
        asked.append(request)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ServerGone, match="no answer within 7 s"):
        Server.of(url, 7).models()
    assert asked == [((host, port), 7)]


class Elsewhere(socket.socket):
    """Stand for a connection to which a name server has led."""

    def getpeername(self):
        return "203.0.113.9", 8000


def test_a_name_of_this_machine_that_leads_to_another_is_not_asked(fake, monkeypatch):
    """Nothing is sent there, neither an image nor the key."""

    def connect(address, timeout):
        opened = Elsewhere(socket.AF_INET, socket.SOCK_STREAM)
        opened.connect(("127.0.0.1", int(fake.url.rpartition(":")[2])))
        return opened

    monkeypatch.setattr(socket, "create_connection", connect)
    for url in (fake.url, fake.url.replace("127.0.0.1", "localhost")):
        with pytest.raises(ServerError, match="is 203.0.113.9 here, another machine") as raised:
            Server.of(url, 30).models()
        assert not isinstance(raised.value, ServerGone)
    assert not fake.requests
    # of another host nothing is known
    assert Server.of(fake.url.replace("127.0.0.1", "example.org"), 30).models() == ["base"]


def test_a_path_before_v1_and_the_proxies_of_the_environment(fake, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match="404: Not Found"):
        Server.of(f"{fake.url}/behind", 30).models()
    assert fake.requests[0][1] == "/behind/v1/models"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_three_times(fake, server, status):
    fake.statuses = [status, status]
    assert server.models() == ["base"] and len(fake.requests) == 3
    fake.statuses = [status] * 3
    with pytest.raises(ServerGone, match=f"status {status}: not now, 3 times in a row") as raised:
        server.models()
    assert raised.value.status == status and len(fake.requests) == 6


def test_the_pause_that_a_server_asks_for_is_kept_within_bounds(fake, server, monkeypatch):
    asked = []
    monkeypatch.setattr(Cancel, "wait", lambda self, seconds: asked.append(seconds))
    for fake.headers in ({"Retry-After": "7"}, {"Retry-After": "999999"}, {"Retry-After": "-1"}):
        fake.statuses = [429]
        server.models()
    assert asked == [7.0, 60.0, 0.01]


@pytest.mark.parametrize("status", [400, 404, 405, 413, 422])
def test_a_refusal_is_not_asked_again(fake, server, status):
    fake.statuses = [status]
    with pytest.raises(ServerError, match=f"GET {fake.url}/v1/models: status {status}: not now"):
        server.models()
    assert len(fake.requests) == 1


def test_a_redirect_is_not_followed(fake, server):
    with FakeServer() as other:
        for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):
            fake.raw = answered(b"", status, f"Location: {other.url}/v1/models\r\n")
            with pytest.raises(ServerError, match="a redirect, which is not followed"):
                server.models()
        assert other.requests == [] and len(fake.requests) == 4


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (0.01, 0.02))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerGone, match="Connection refused.*3 times in a row"):
            Server.of(url, 5).models()


def test_a_slow_server_is_not_asked_twice(fake):
    fake.hangs = True
    with pytest.raises(ServerGone, match="no answer within 0.2 s"):
        Server.of(fake.url, 0.2).models()
    assert len(fake.requests) == 1


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n{"])
def test_a_server_that_dribbles_ends_in_time(start):
    """Each byte would start a timeout of the socket anew."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def dribble():
            client, _ = listening.accept()
            with client:
                client.sendall(start)
                while not ended.wait(0.02):
                    try:
                        client.sendall(b"H" if not start else b"a")
                    except OSError:
                        return

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            with pytest.raises(ServerGone, match="no answer within 0.3 s"):
                Server.of(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3).models()
        finally:
            ended.set()
            thread.join()


BROKEN = {
    "nothing": (b"", "3 times in a row"),
    "half an answer": (answered(b'{"data": []}')[:-5], "half an answer came.*3 times in a row"),
    "half a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
        "half an answer",
    ),
    "no chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{", "half an answer"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP"),
    "no status": (b"HTTP/1.1 abc OK\r\n\r\n", "no HTTP"),
    "huge header": (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", "no HTTP"),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 200 + b"\r\n", "no HTTP"),
    "HTML": (answered(b"<html>"), "no JSON came: .*it begins with '<html>'"),
    "blank": (answered(b""), "no JSON came"),
    "cut JSON": (answered(b'{"data": ['), "no JSON came"),
    "two values": (answered(b"{} {}"), "no JSON came"),
    "NaN": (answered(b'{"data": NaN}'), "no JSON came: holds NaN"),
    "infinity": (answered(b'{"data": -Infinity}'), "no JSON came: holds -Infinity"),
    "1e999": (answered(b'{"data": 1e999}'), "too large"),
    "deep": (answered(b"[" * 100_000), "nested too deep"),
    "digits": (answered(b"9" * 5000), "5,000 digits"),
    "a key twice": (answered(b'{"data": [], "data": []}'), "there twice"),
    "Latin-1": (answered(b'{"data": "\xe4"}'), "not UTF-8"),
    "UTF-16": (answered('{"data": []}'.encode("utf-16")), "not UTF-8"),
    "gzip": (answered(b"\x1f\x8b\x08\0\0\0"), "not UTF-8"),
    "no object": (answered(b"[]"), "no list of models"),
    "no list": (answered(b'{"data": {"id": "a"}}'), "no list of models"),
    "no name": (answered(b'{"data": [{"id": 1}]}'), "no list of models"),
    "null": (answered(b"null"), "no list of models"),
    "a number": (answered(b'{"data": 5}'), "no list of models"),
    "a boolean": (answered(b'{"data": true}'), "no list of models"),
    "no chunks": (answered(b"", headers="Transfer-Encoding: chunked\r\n"), "half an"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_answer_is_one_line(fake, server, kind):
    fake.raw, says = BROKEN[kind]
    with pytest.raises(ServerError, match=says) as raised:
        server.models()
    text = str(raised.value)
    assert text.startswith(f"GET {fake.url}/v1/models: ") and text.isprintable()
    assert isinstance(raised.value, ServerGone) == ("times in a row" in text)


@pytest.mark.parametrize("announced", [True, False])
def test_an_oversized_answer_is_refused(fake, server, monkeypatch, announced):
    monkeypatch.setattr(engine.server, "MOST_BYTES", 1000)
    content = b" " * 998 + b"{}"
    start = answered(content) if announced else b"HTTP/1.0 200 OK\r\n\r\n" + content
    fake.raw = start
    assert server.get("/x") == {}
    fake.raw = start.replace(b"1000", b"1001") + b" "
    with pytest.raises(ServerError, match="more than 1,000 bytes"):
        server.get("/x")
    assert server.post("/x", {}, expected=1) == {}


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "start, then",
    [
        (CHUNKED + b"-1\r\n", b"x" * 10_000),  # which Python reads until the end
        (CHUNKED, b"1;" + b"x" * 10_000 + b"\r\nx\r\n"),  # next to nothing in each chunk
        (CHUNKED + b"0\r\n", b"x" * 10_000 + b"\r\n"),  # trailers
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 400),
    ],
)
def test_no_more_is_read_than_an_answer_may_have(server, fake, monkeypatch, start, then):
    monkeypatch.setattr(engine.server, "MOST_BYTES", 1000)
    monkeypatch.setattr(engine.server, "MOST_AROUND", 50_000)
    fake.raw = start + then * 500  # 5 MB
    with pytest.raises(ServerError, match="more than 1,000 bytes"):
        server.get("/x")


def test_a_long_answer_in_chunks_is_whole(server, fake, monkeypatch):
    monkeypatch.setattr(engine.server, "MOST_BYTES", 100_000)
    fake.raw = CHUNKED + b"1\r\n[\r\n" + b"2\r\n1,\r\n" * 40_000 + b"2\r\n1]\r\n0\r\n\r\n"
    assert server.get("/x") == [1] * 40_001


@pytest.mark.parametrize(
    "status, tries, says",
    [
        (413, 1, "status 413: too large"),
        (503, 3, "status 503: too large"),
        (200, 3, "no answer"),  # to half a request
    ],
)
def test_a_request_that_is_answered_before_it_is_all_sent(monkeypatch, status, tries, says):
    """A proxy refuses a large image by its headers alone, and hangs up."""
    said, asked = b'{"error": "too large"}', []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse():
            for _ in range(tries):
                opened, _address = listening.accept()
                with opened:
                    asked.append(opened.recv(4096))
                    opened.sendall(answered(said, f"{status} No"))

        monkeypatch.setattr(engine.server, "PAUSES", (0.0, 0.0))
        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ServerError, match=says) as raised:
            Server.of(url, 30).post("/x", {"image": "x" * 20_000_000})
        thread.join(30)
    assert raised.value.status == (None if status == 200 else status) and len(asked) == tries


def test_a_servers_words_are_cut_and_cleaned(fake, server):
    fake.raw = answered(b"\x1b[2J\x07" + b"evil\n" * 200, "400 Bad")
    with pytest.raises(ServerError) as raised:
        server.get("/x")
    text = str(raised.value)
    assert text.isprintable() and "[2J evil evil" in text and len(text) < 400
    for length, end in ((300, "xx"), (301, "x...")):
        fake.raw = answered(b"x" * length, "400 Bad")
        with pytest.raises(ServerError, match=r"x{297}(xxx|\.\.\.)$") as raised:
            server.get("/x")
        assert str(raised.value).endswith(end)


def test_a_server_without_a_version(fake, server):
    fake.changed = lambda path, document: {"version": 1}
    assert server.version() is None
    fake.changed = lambda path, document: b"<html>"
    assert server.version() is None
    for statuses in ([404], [503] * 3):  # a gateway may refuse what it does not know
        fake.statuses = statuses
        assert server.version() is None
    fake.raw = b""
    with pytest.raises(ServerGone):
        server.version()


def document(draw, depth=0):
    """Make a JSON value with the names that are looked for in it."""
    names = ["data", "id", "error", "message", "detail", "version", "x"]
    kind = draw.randrange(10) if depth < 4 else 9
    if kind < 4:
        return {draw.choice(names): document(draw, depth + 1) for _ in range(draw.randrange(3))}
    if kind < 6:
        return [document(draw, depth + 1) for _ in range(draw.randrange(3))]
    return draw.choice([None, True, False, 0, 5, -1, 1.5, 10**250, "", "a", "\ud800", "base"])


def test_fuzzed_documents_are_valid_or_refused(monkeypatch):
    server, listed, versions = Server("http://127.0.0.1:1", 1, None), 0, 0
    for seed in range(5000):
        draw = random.Random(seed)
        content = json.dumps(document(draw)).encode()
        if draw.random() < 0.1:
            content = draw.randbytes(20)
        monkeypatch.setattr(Server, "_ask", lambda *request, content=content: content)
        assert server.command("/x", {}).isprintable(), seed
        version = server.version()
        assert version is None or version.isprintable(), seed
        versions += version is not None
        try:
            names = server.models()
        except ServerError as error:
            assert str(error).isprintable(), seed
        else:
            listed += 1
            assert all(type(name) is str for name in names), seed
    assert listed > 10 and versions > 10


def test_tls_is_spoken_and_verified(fake, server, tmp_path, monkeypatch):
    certificate = tmp_path / "both.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + [
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
        ]
        + ["-keyout", certificate, "-out", tmp_path / "cert.pem"],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("openssl is not installed")
    certificate.write_bytes(certificate.read_bytes() + (tmp_path / "cert.pem").read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FakeServer() as fake:
        fake.wrap(context)
        url = fake.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(ServerError, match="certificate is not trusted"):
            Server.of(url, 10).models()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert Server.of(url, 10).models() == ["base"]
        with pytest.raises(ServerError, match="certificate is not trusted"):  # of another name
            Server.of(url.replace("localhost", "127.0.0.1"), 10).models()
        fake.hangs = True
        with pytest.raises(ServerGone, match="no answer within"):
            Server.of(url, 0.3).models()
    with pytest.raises(ServerError, match="does not speak https"):
        Server.of(server.base_url.replace("http:", "https:"), 10).models()


# ---- leaving off ---------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["before", "hanging", "between tries"])
def test_a_request_is_left_off(fake, server, when, monkeypatch):
    cancel, found = Cancel(), []
    fake.hangs = when != "between tries"
    if when == "between tries":
        monkeypatch.setattr(engine.server, "PAUSES", (60, 60))
        fake.statuses = [503]

    def ask():
        CANCEL.set(cancel)
        try:
            found.append(server.models())
        except ServerError as error:
            found.append(error)

    if when == "before":
        cancel()
    thread = threading.Thread(target=ask)
    thread.start()
    if when != "before":
        while not fake.requests:
            thread.join(0.01)
        # none of them holds the end of the process
        timers = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
        assert all(timer.daemon for timer in timers) and (timers or when != "hanging")
        cancel()
    thread.join(20)
    assert not thread.is_alive() and "left off" in str(found[0])


def test_a_server_is_asked_without_torch():
    code = (
        "import sys, engine.server;"
        "print([name for name in ('torch', 'transformers', 'requests') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert found.stdout == "[]\n", found.stderr
