"""Protect completions that come from a server: whole and valid, or one line that says why not.

Run: pytest tests/engine/test_chat_api.py
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import engine.server
from data.prompts import Prompt, build_messages
from engine.chat_api import (
    Answer,
    Choice,
    ask,
    ask_all,
    chat_messages,
    image_url,
    training_options,
)
from engine.runtime import StopRequested
from engine.server import CANCEL, Server, ServerError, ServerGone
from tests.helpers.fake_server import FakeServer, chat_answer

BODY = {
    "model": "base",
    "messages": [{"role": "user", "content": "Which?"}],
    "n": 3,
    "max_tokens": 4,
    "temperature": 0.8,
    "top_p": 0.95,
    "seed": 7,
} | training_options({5, 2}, (9,))
PROMPT = [1, 8, 8, 3]
IDS = [[4, 5], [6, 7, 8, 4], [5]]
LOGPROBS = [[-0.5, -0.25], [-1.0, -2.0, -0.125, -3], [0.0]]


def write(body):
    return copy.deepcopy(chat_answer(body, IDS, LOGPROBS, PROMPT))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeServer(write) as fake:
        yield fake


@pytest.fixture
def server(fake):
    return Server.of(fake.url, 30)


# ---- what is asked -------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_goes_out_without_loss_and_without_what_stands_beside_it(mode):
    shape = (7, 5, 3) if mode == "RGB" else (7, 5)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels)
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", "Doe")
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text, icc_profile=b"Doe", exif=b"Exif\0\0Doe")
    head, content = image_url(Image.open(file)).split(",")
    sent = base64.b64decode(content)
    assert head == "data:image/png;base64" and b"Doe" not in sent
    opened = Image.open(io.BytesIO(sent))
    assert opened.mode == mode and np.array_equal(np.asarray(opened), pixels)
    assert set(opened.info) == set()


def test_messages_in_the_apis_form():
    image = Image.new("L", (2, 2))
    system, user = chat_messages(build_messages(Prompt("p", "Which?", system="You.")), [image])
    assert system == {"role": "system", "content": "You."}
    assert user == {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": image_url(image)}},
            {"type": "text", "text": "Which?"},
        ],
    }


@pytest.mark.parametrize("count, says", [(0, "more places"), (2, "fewer places")])
def test_as_many_images_as_places(count, says):
    with pytest.raises(ValueError, match=says):
        chat_messages(build_messages(Prompt("p", "Which?")), [Image.new("L", (2, 2))] * count)


def test_what_training_asks_for():
    assert training_options(frozenset({5, 2}), (9, 3)) == {
        "logprobs": True,
        "return_token_ids": True,
        "stop_token_ids": [2, 5],
        "ignore_eos": True,
        "logit_bias": {"3": -100, "9": -100},
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


# ---- what comes ----------------------------------------------------------------------------------
def test_a_whole_answer(fake, server):
    assert ask(server, BODY, with_ids=True) == Answer(
        PROMPT,
        [
            Choice("", False, [4, 5], [-0.5, -0.25]),
            Choice("", True, [6, 7, 8, 4], [-1.0, -2.0, -0.125, -3.0]),
            Choice("", False, [5], [0.0]),
        ],
        7,
        "base",
    )
    assert fake.bodies() == [BODY]


def test_one_completion_where_the_request_does_not_say_how_many(fake, server):
    fake.changed = lambda path, document: document | {"choices": document["choices"][:1]}
    body = {name: value for name, value in BODY.items() if name != "n"}
    assert [choice.text for choice in ask(server, body, with_ids=False).choices] == ["text 0"]


def test_choices_are_put_in_order(fake, server):
    fake.changed = lambda path, document: document | {"choices": document["choices"][::-1]}
    assert [choice.ids for choice in ask(server, BODY, with_ids=True).choices] == IDS
    texts = [choice.text for choice in ask(server, BODY, with_ids=False).choices]
    assert texts == ["text 0", "text 1", "text 2"]


def test_texts_alone_of_any_server(fake, server):
    """What OpenAI's protocol has, and nothing else; a field that has no text is an empty one."""

    def changed(path, document):
        for choice in document["choices"]:
            del choice["token_ids"], choice["logprobs"]
        document["choices"][0]["message"]["content"] = None
        document["choices"][1]["message"]["content"] = "half a pair \ud83d"
        document["choices"][2]["finish_reason"] = "content_filter"
        del document["prompt_token_ids"], document["usage"]
        return document | {"model": "base-2026-08-06"}

    fake.changed = changed
    answer = ask(server, BODY, with_ids=False)
    assert answer == Answer(
        None,
        [Choice("", False), Choice("half a pair \ufffd", True), Choice("text 2", False)],
        None,
        "base-2026-08-06",
    )
    with pytest.raises(ServerError, match="'base-2026-08-06' answered, and 'base' was asked"):
        ask(server, BODY, with_ids=True)


def test_a_probability_that_is_rounded_above_1(fake, server):
    fake.changed = partial(put, ("choices", 0, "logprobs", "content", 0, "logprob"), 3e-5)
    assert ask(server, BODY, with_ids=True).choices[0].logprobs == [0.0, -0.25]


def put(place, value, path, document):
    """Put a value at a place of a document, or take it away where it is DELETE."""
    inner = document
    for name in place[:-1]:
        inner = inner[name]
    if value is DELETE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


DELETE = object()
FAULTS = [
    (("choices", 2), DELETE, "2 completions came, and 3 were asked for"),
    (("choices",), DELETE, "no choices came"),
    (("choices",), [], "0 completions came"),
    (("choices",), {"0": 1}, "choices is an object of 1, not of the type list"),
    (("choices", 1), None, "choices.. is None"),
    (("choices", 1, "index"), 0, "completion 0 came twice"),
    (("choices", 1, "index"), 3, "index is 3, no whole number from 0 to 2"),
    (("choices", 1, "index"), -1, "index is -1"),
    (("choices", 1, "index"), True, "index is True"),
    (("choices", 1, "index"), 1.0, "index is 1.0"),
    (("choices", 1, "index"), DELETE, "index is None"),
    (("choices", 1, "message"), "text", "message is 'text'"),
    (("choices", 1, "message"), DELETE, "message is None"),
    (("choices", 1, "message", "content"), 5, "content is 5"),
    (("choices", 1, "message", "content"), ["a"], "content is a list of 1"),
    (("choices", 1, "finish_reason"), None, "finish_reason is None"),
    (("choices", 1, "finish_reason"), "abort", "ended by 'abort'"),
    (("choices", 1, "token_ids"), DELETE, "token_ids is None"),
    (("choices", 1, "token_ids"), [], "has 0 tokens, and 1 to 4 were asked for"),
    (("choices", 1, "token_ids"), [1] * 5, "has 5 tokens, and 1 to 4 were asked for"),
    (("choices", 1, "token_ids"), [1, 2, 3], "3 token ids came with 4 log-probabilities"),
    (("choices", 1, "token_ids", 0), -1, r"token_ids\[\] is -1"),
    (("choices", 1, "token_ids", 0), False, r"token_ids\[\] is False"),
    (("choices", 1, "token_ids", 0), 6.0, r"token_ids\[\] is 6.0"),
    (("choices", 1, "token_ids", 0), 2**31, r"token_ids\[\] is 2147483648"),
    (("choices", 1, "token_ids", 0), 10**200, r"token_ids\[\] is 10{96}"),
    (("choices", 1, "logprobs"), None, "logprobs is None"),
    (("choices", 1, "logprobs", "content"), None, "content is None"),
    (("choices", 1, "logprobs", "content"), [], "4 token ids came with 0 log-prob"),
    (("choices", 1, "logprobs", "content", 2), -0.5, r"content\[\] is -0.5"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), "-0.5", "is '-0.5', no number"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), True, "is True, no number"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), DELETE, "is None, no number"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), 0.001, "is 0.001; .* at most 0"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), -9999.0, "is -9999.0"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), -(10**290), "is -10{9}"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), float("nan"), "holds NaN"),
    (("choices", 1, "logprobs", "content", 2, "logprob"), float("-inf"), "holds -Infinity"),
    (("model",), "other", "'other' answered, and 'base' was asked; see /v1/models"),
    (("model",), DELETE, "model is None"),
    (("prompt_token_ids",), DELETE, "no token ids came .*vLLM 0.10.2 or newer"),
    (("prompt_token_ids",), None, "no token ids came"),
    (("prompt_token_ids",), "1 8", "prompt_token_ids is '1 8'"),
    (("prompt_token_ids", 1), None, r"prompt_token_ids\[\] is None"),
    (("usage", "completion_tokens"), -1, "usage.completion_tokens is -1"),
    (("usage", "completion_tokens"), 10**9 + 1, "usage.completion_tokens is 1000000001"),
    (("usage",), [], "usage is a list of 0"),
]


@pytest.mark.parametrize("place, value, says", FAULTS)
def test_half_an_answer_is_one_line(fake, server, place, value, says):
    fake.changed = partial(put, place, value)
    with pytest.raises(ServerError, match=says) as raised:
        ask(server, BODY, with_ids=True)
    text = str(raised.value)
    assert text.startswith(f"POST {fake.url}/v1/chat/completions: ") and text.isprintable()
    assert len(text) < 400 and not isinstance(raised.value, ServerGone)


@pytest.mark.parametrize(
    "document, says",
    [
        ({"error": {"message": "out of\nmemory"}}, r"the server said 'out of\\nmemory'"),
        ({"message": "x" * 500}, "the server said 'x{80}"),
        ({"a": 1}, "the server said an object of 1"),
        ([], "no object"),
        (None, "no object"),
        (b"<html>", "no JSON came"),
    ],
)
def test_what_is_no_answer_at_all(fake, server, document, says):
    fake.changed = lambda path, whole: document
    with pytest.raises(ServerError, match=says) as raised:
        ask(server, BODY, with_ids=True)
    assert len(str(raised.value)) < 400


def test_the_key_that_a_server_puts_into_an_answer_is_not_shown(fake, monkeypatch):
    key = "sk-Secret_0123456789"
    monkeypatch.setenv("VLLM_API_KEY", key)
    server = Server.of(fake.url, 30)
    for place in (("model",), ("choices", 1, "index"), ("choices", 1, "finish_reason")):
        for value in (key, "x" * 90 + key):  # whole, and where it would be cut
            fake.changed = partial(put, place, value)
            with pytest.raises(ServerError) as raised:
                ask(server, BODY, with_ids=True)
            assert "sk-" not in str(raised.value)


@pytest.mark.parametrize("key", ["sk-Secret_0123456789", "text"])
def test_what_is_kept_of_an_answer_holds_no_key(fake, monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    said = partial(put, ("choices", 1, "message", "content"), f"a {key} b")
    fake.changed = lambda path, document: said(path, document | {"model": f"m-{key}"})
    answer = ask(Server.of(fake.url, 30), BODY, with_ids=False)
    assert answer.model == "m-***"
    # a key as short as a word is left in a text, which would else be another
    assert answer.choices[1].text == ("a *** b" if len(key) > 8 else "a text b")


def test_texts_that_no_row_holds_are_refused(fake, server):
    most = "y" * 10**6
    fake.changed = partial(put, ("choices", 1, "message", "content"), most)
    assert ask(server, BODY, with_ids=False).choices[1].text == most
    fake.changed = partial(put, ("choices", 1, "message", "content"), most + "x")
    with pytest.raises(ServerError, match="has 1,000,001 characters; 1,000,000 are read"):
        ask(server, BODY, with_ids=False)
    # with ids nobody reads it, and it is not kept
    assert ask(server, BODY, with_ids=True).choices[1].text == ""


def test_an_answer_may_be_as_long_as_its_completions(fake, server, monkeypatch):
    monkeypatch.setattr(engine.server, "MOST_BYTES", 0)
    document = json.dumps(write(BODY)).encode()
    for spaces, whole in ((12_000, True), (12_001, False)):  # 3 completions of 4 tokens
        fake.changed = lambda path, _, spaces=spaces: document.ljust(spaces)
        if whole:
            assert ask(server, BODY, with_ids=True).prompt_ids == PROMPT
        else:
            with pytest.raises(ServerError, match="more than 12,000 bytes"):
                ask(server, BODY, with_ids=True)


def test_a_model_that_is_not_served(fake, server):
    with pytest.raises(ServerError, match="404: The model `x` does not exist.*v1/models") as raised:
        ask(server, BODY | {"model": "x"}, with_ids=True)
    assert raised.value.status == 404


# ---- fuzzed answers ------------------------------------------------------------------------------
HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**250, 0.5, -0.0, -1e308, 1e308),
    *("", "x", "stop", "length", "base", "\ud83d", "\0\x1b[2J", "9" * 5000, "é" * 50),
    *([], {}, [[]], [{}], {"": None}, [0] * 300, float("nan"), float("inf"), float("-inf")),
    *("DEEP", "HUGE"),
]


def places_of(value, place=()):
    """List the places of all that lies in a document."""
    yield place
    if isinstance(value, (dict, list)):
        names = value if isinstance(value, dict) else range(len(value))
        for name in names:
            yield from places_of(value[name], (*place, name))


def mutated(document, draw):
    """Change a valid answer in one to three places, as JSON or as bytes."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(0, 2)):
        *within, last = draw.choice([place for place in places_of(document) if place])
        inner = document
        for name in within:
            inner = inner[name]
        act = draw.choice(["replace", "replace", "delete", "copy", "swap"])
        if act == "replace":
            inner[last] = copy.deepcopy(draw.choice(HOSTILE))
        elif act == "delete":
            del inner[last]
        elif isinstance(inner, list):
            other = draw.randrange(len(inner))
            if act == "copy":
                inner.insert(other, copy.deepcopy(inner[last]))
            else:
                inner[last], inner[other] = inner[other], inner[last]
        elif act == "copy":
            inner[draw.choice(list(document) + ["index", "logprob"])] = inner[last]
    content = json.dumps(document, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")
    content = content.replace(b'"DEEP"', b"[" * 500).replace(b'"HUGE"', b"1" * 6000)
    for _ in range(draw.choice([0, 0, 0, 1, 1, 3])):
        at, size = draw.randrange(len(content) + 1), draw.choice([0, 1, 1, 4, 200])
        new = draw.choice([b"", draw.randbytes(2), b'"', b"}", b"0", b"-", b"e9", b"\\u", b"\xff"])
        content = content[:at] + new + content[at + size :]
    return content


def is_valid(answer, with_ids):
    """Tell whether an answer holds what a caller relies on."""
    whole = isinstance(answer.model, str) and len(answer.choices) == 3
    for choice in answer.choices:
        whole &= isinstance(choice.text, str) and type(choice.truncated) is bool
        choice.text.encode()
        if with_ids:
            whole &= 1 <= len(choice.ids) <= 4 and len(choice.ids) == len(choice.logprobs)
            whole &= all(type(token) is int and 0 <= token < 2**31 for token in choice.ids)
            whole &= all(-9999 < value <= 0 for value in choice.logprobs)
        else:
            whole &= choice.ids is None and choice.logprobs is None
    if with_ids:
        whole &= answer.model == "base" and all(type(token) is int for token in answer.prompt_ids)
    return whole


def test_ten_thousand_fuzzed_answers_are_valid_or_refused(monkeypatch):
    server, valid = Server("http://127.0.0.1:1", 1, "sk-Secret"), write(BODY)
    accepted = 0
    for seed in range(10_000):
        draw = random.Random(seed)
        content, with_ids = mutated(valid, draw), seed % 3 > 0
        monkeypatch.setattr(Server, "_ask", lambda *request, content=content: content)
        try:
            answer = ask(server, BODY, with_ids=with_ids)
        except ServerError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 500, (seed, text)
        else:
            accepted += 1
            assert is_valid(answer, with_ids), (seed, content)
    # neither is rare: a mutation may hit what nobody reads
    assert 2000 < accepted < 8000


def test_fuzzed_bytes_of_http_are_valid_or_refused(fake, server):
    document = json.dumps(write(BODY)).encode()
    whole = (
        b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(document)}\r\n\r\n".encode()
        + document
    )
    accepted, short = 0, Server(fake.url, 5, None)
    for seed in range(300):
        draw = random.Random(seed)
        at, size = draw.randrange(130), draw.choice([0, 1, 1, 4, 30])
        new = draw.choice([b"", draw.randbytes(3), b"\r\n", b"9", b":", b"\0", b"-", b"500"])
        fake.raw = whole[:at] + new + whole[at + size :]
        try:
            accepted += is_valid(ask(short, BODY, with_ids=True), True)
        except ServerError as error:
            assert str(error).isprintable(), seed
    assert 20 < accepted < 280


# ---- many at a time ------------------------------------------------------------------------------
def test_answers_come_in_the_order_of_the_questions():
    together, most, seen = threading.Barrier(3), [], []

    def one(i):
        most.append(threading.active_count())
        together.wait(10)  # three at a time, or this never ends
        time.sleep(0.02 * (5 - i))
        return i * i

    found = ask_all(
        [partial(one, i) for i in range(6)],
        3,
        lambda: False,
        lambda i, answer: seen.append((i, answer, threading.current_thread())),
    )
    assert found == [0, 1, 4, 9, 16, 25]
    assert sorted(seen[:3])[0][:2] == (0, 0) and [i for i, _, _ in seen] != list(range(6))
    assert {thread for _, _, thread in seen} == {threading.main_thread()}


def test_calls_at_a_time_are_bounded():
    """However many are asked for, threads and connections do not run out."""
    together, most = threading.Barrier(128), []

    def one():
        together.wait(30)
        most.append(sum(thread.name == "ask" for thread in threading.enumerate()))

    ask_all([one] * 256, 1000, lambda: False)
    assert max(most) == 128


def test_nothing_to_ask():
    assert ask_all([], 4, lambda: False) == []


def test_the_first_failure_ends_all(fake, server):
    """Those under way are broken off, and those that wait are never asked."""
    asked = []

    def fails():
        while len(asked) < 2:
            time.sleep(0.01)
        raise ServerError("no")

    def hangs():
        asked.append(1)
        return ask(server, BODY, with_ids=True)

    fake.hangs = True
    with pytest.raises(ServerError, match="^no$"):
        ask_all([hangs, hangs, fails, hangs, hangs], 3, lambda: False)
    assert len(asked) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "ask"]


def test_what_comes_beside_a_failure_is_handed_on():
    begun, handed = threading.Event(), []

    def fails() -> int:
        begun.wait(60)
        raise ServerError("no")

    def comes() -> int:
        begun.set()
        CANCEL.get().wait(60)  # until the other has failed
        return 2

    with pytest.raises(ServerError, match="^no$"):
        ask_all([fails, comes], 2, lambda: False, lambda i, answer: handed.append((i, answer)))
    assert handed == [(1, 2)]


def test_a_failure_of_the_caller_ends_all(fake, server):
    def on_answer(i, answer):
        fake.hangs = True
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ask_all([partial(ask, server, BODY, with_ids=True)] * 20, 2, lambda: False, on_answer)
    assert not [thread for thread in threading.enumerate() if thread.name == "ask"]


def test_a_stop_is_honoured_while_requests_hang(fake, server):
    fake.hangs = True
    with pytest.raises(StopRequested):
        ask_all([partial(ask, server, BODY, with_ids=True)] * 8, 4, lambda: len(fake.requests) == 4)
    assert len(fake.requests) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "ask"]


def test_what_has_come_is_handed_on_before_a_stop():
    third, handed = threading.Event(), []

    def waits() -> int:
        third.set()  # by the thread that has put the first two answers there
        CANCEL.get().wait(60)
        raise ServerError("broken off")

    with pytest.raises(StopRequested):
        ask_all(
            [lambda: 1, lambda: 2, waits],
            1,
            lambda: third.wait(60),
            lambda i, answer: handed.append((i, answer)),
        )
    assert handed == [(0, 1), (1, 2)]


def test_a_stop_is_honoured_between_tries(fake, server, monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (60, 60))
    fake.statuses = [503]
    with pytest.raises(StopRequested):
        ask_all([partial(ask, server, BODY, with_ids=True)], 1, lambda: bool(fake.requests))
    assert not [thread for thread in threading.enumerate() if thread.name == "ask"]


def test_a_call_that_cannot_be_broken_off_holds_nothing():
    ended = threading.Event()
    with pytest.raises(StopRequested):
        ask_all([lambda: ended.wait(60)], 1, lambda: True)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "ask"]
    assert thread.daemon
    ended.set()
    thread.join()


def test_torch_is_not_needed():
    code = (
        "import sys, engine.chat_api;"
        "print([name for name in ('torch', 'transformers', 'requests') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr
