"""Ask a server for chat completions, many at a time, and check every field of what it answers.

    ask_all([partial(ask, server, body, with_ids=True) for body in bodies], 16, should_stop)

The request is OpenAI's, so any server that speaks its protocol can be evaluated. For training a
server also has to give token ids with their log-probabilities, as vLLM does (`return_token_ids`,
from 0.10.2 on). No torch is imported: an evaluation over HTTP needs none.
"""

from __future__ import annotations

import base64
import io
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from data.json_rows import whole_characters
from data.predictions import MAX_COUNT
from engine.runtime import StopRequested
from engine.server import CANCEL, Cancel, Server, words_of

PATH = "/v1/chat/completions"
LARGEST_ID = 2**31 - 1
BYTES_A_TOKEN = 1000  # of an answer: its text, its id, its log-probability, its bytes as numbers
MOST_TEXT = 10**6  # characters of a completion; rows of some 16 times as many cannot be read back
SECRET = 8  # letters of a key; a shorter one may be a word of a completion, and stays in it
LARGEST_LOGPROB = 1e-4  # a probability of 1 may be rounded up
SMALLEST_LOGPROB = -9999.0  # what vLLM writes for probability 0, so no token is drawn with it
LOOK_EVERY = 0.1  # seconds between two looks at should_stop
MOST_AT_ONCE = 128  # calls, of two threads and a connection each
LAST_WAIT = 0.5  # seconds for which requests that were broken off may take to end
# Lets vLLM draw by temperature and top_p alone, whatever the checkpoint's generation_config says.
PLAIN_SAMPLING = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

T = TypeVar("T")
_Came = tuple[int, T | None, BaseException | None]  # place, answer or error


# ---- what is asked -------------------------------------------------------------------------------
def image_url(image: Image.Image) -> str:
    """Write a picture as a data URL: a PNG, without loss.

    Its pixels alone go out. What a file may say of a patient beside them stays here.
    """
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    content = io.BytesIO()
    bare.save(content, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def chat_messages(messages: Sequence[dict], images: Sequence[Image.Image]) -> list[dict]:
    """Bring messages into the API's form.

    messages: as `data.prompts.build_messages` makes them, with a place for each image.
    images: in the order of their places. Raises ValueError where they are not as many.
    """
    left = list(images)
    found = []
    for message in messages:
        parts: list[dict] = []
        for part in message["content"]:
            if part["type"] == "image":
                if not left:
                    raise ValueError("messages have more places for images than there are images")
                part = {"type": "image_url", "image_url": {"url": image_url(left.pop(0))}}
            parts.append(part)
        only_text = all(part["type"] == "text" for part in parts)
        # one string: not every server takes a list there
        content = "".join(part["text"] for part in parts) if only_text else parts
        found.append({"role": message["role"], "content": content})
    if left:
        raise ValueError("messages have fewer places for images than there are images")
    return found


def training_options(stop_ids: Collection[int], suppressed_ids: Collection[int]) -> dict[str, Any]:
    """Make what a request for training has beside OpenAI's fields, by vLLM's names.

    Token ids and log-probabilities come back, and nothing but temperature and top_p decides how
    completions are drawn, whatever the checkpoint's generation_config says.

    stop_ids: those that end a completion, alone. suppressed_ids: those that are never drawn.
    """
    return {
        "logprobs": True,
        "return_token_ids": True,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,  # the checkpoint's own end is among stop_ids where it is one
        "logit_bias": {str(token): -100 for token in sorted(suppressed_ids)},
    } | PLAIN_SAMPLING


# ---- what comes ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """Hold one completion of an answer.

    text: without control tokens, as the server decodes it. Empty where ids were asked for.
    truncated: whether it ended at max_tokens.
    ids, logprobs: of its tokens, with the stop token. None where they were not asked for.
    """

    text: str
    truncated: bool
    ids: list[int] | None = None
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Answer:
    """Hold what a server answered.

    prompt_ids: the tokens that it has read. None where they were not asked for.
    choices: in the order of their indexes.
    completion_tokens: of all choices together, None where the server does not say.
    model: the name under which it answered.
    """

    prompt_ids: list[int] | None
    choices: list[Choice]
    completion_tokens: int | None
    model: str


class _Wrong(Exception):
    """Say what is wrong with an answer. value: of the server's, which takes the place of {}."""

    def __init__(self, text: str, value: Any = None):
        super().__init__(text)
        self.value = value


def ask(server: Server, body: dict[str, Any], *, with_ids: bool) -> Answer:
    """Ask for the completions of one prompt.

    body: the request, with "model" and "messages" at least.
    with_ids: whether token ids and log-probabilities must be there, and the model asked for must
        have answered. Without, the name may be another (aliases are usual) and is in the answer.

    The key, where a server says it back, is masked in texts and in the model's name.

    Raises ServerError for every answer that is not whole, ServerGone as `Server.post` does.
    """
    expected = BYTES_A_TOKEN * body.get("n", 1) * body.get("max_tokens", 0)
    document = server.post(PATH, body, expected)
    try:
        return _without_key(server, _answer(document, body, with_ids))
    except _Wrong as wrong:
        text = str(wrong).replace("{}", server.shown(wrong.value))
        raise server.error("POST", PATH, text) from None


def _without_key(server: Server, answer: Answer) -> Answer:
    """Mask the key in what is kept of an answer."""
    choices = answer.choices
    if len(server.api_key or "") >= SECRET:
        choices = [replace(one, text=server.without_key(one.text)) for one in choices]
    return replace(answer, choices=choices, model=server.without_key(answer.model))


def _answer(document: Any, body: dict[str, Any], with_ids: bool) -> Answer:
    if not isinstance(document, dict):
        raise _Wrong("what came is no object")
    if "choices" not in document:
        raise _Wrong("no choices came; the server said {}", words_of(document) or document)
    model = _typed(document.get("model"), str, "model")
    if with_ids and model != body["model"]:
        raise _Wrong(f"{{}} answered, and {body['model']!r} was asked; see /v1/models", model)
    count = body.get("n", 1)
    entries = _typed(document["choices"], list, "choices")
    if len(entries) != count:
        raise _Wrong(f"{len(entries)} completions came, and {count} were asked for")
    prompt_ids = None
    if with_ids:
        if document.get("prompt_token_ids") is None:
            raise _Wrong(
                "no token ids came (return_token_ids): training needs vLLM 0.10.2 or newer,"
                " evaluation does not"
            )
        prompt_ids = _ids(document["prompt_token_ids"], "prompt_token_ids")
    choices: dict[int, Choice] = {}
    for entry in entries:
        index = _whole(_typed(entry, dict, "choices[]").get("index"), count - 1, "index")
        if index in choices:
            raise _Wrong(f"completion {index} came twice")
        choices[index] = _choice(entry, body, with_ids)
    return Answer(prompt_ids, [choices[i] for i in range(count)], _usage(document), model)


def _choice(entry: dict[str, Any], body: dict[str, Any], with_ids: bool) -> Choice:
    message = _typed(entry.get("message"), dict, "message")
    content = message.get("content")
    text = "" if content is None else _typed(content, str, "content")
    reason = _typed(entry.get("finish_reason"), str, "finish_reason")
    if not with_ids:
        if len(text) > MOST_TEXT:
            raise _Wrong(f"a completion has {len(text):,} characters; {MOST_TEXT:,} are read")
        return Choice(whole_characters(text)[0], reason == "length")
    if reason not in ("stop", "length"):
        raise _Wrong("a completion ended by {}, neither by a stop token nor in length", reason)
    ids = _ids(entry.get("token_ids"), "token_ids")
    most = body.get("max_tokens")
    if not ids or (most is not None and len(ids) > most):
        raise _Wrong(f"a completion has {len(ids)} tokens, and 1 to {most} were asked for")
    logprobs = _logprobs(entry.get("logprobs"))
    if len(ids) != len(logprobs):
        raise _Wrong(f"{len(ids)} token ids came with {len(logprobs)} log-probabilities")
    return Choice("", reason == "length", ids, logprobs)  # the text would fill the memory


def _logprobs(value: Any) -> list[float]:
    content = _typed(_typed(value, dict, "logprobs").get("content"), list, "logprobs.content")
    found = []
    for entry in content:
        logprob = _typed(entry, dict, "logprobs.content[]").get("logprob")
        if isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
            raise _Wrong("a log-probability is {}, no number", logprob)
        if not SMALLEST_LOGPROB < logprob <= LARGEST_LOGPROB:
            raise _Wrong("a log-probability is {}; that of a drawn token is at most 0", logprob)
        found.append(min(float(logprob), 0.0))
    return found


def _usage(document: dict[str, Any]) -> int | None:
    usage = document.get("usage")
    tokens = None if usage is None else _typed(usage, dict, "usage").get("completion_tokens")
    return None if tokens is None else _whole(tokens, MAX_COUNT, "usage.completion_tokens")


def _ids(value: Any, name: str) -> list[int]:
    return [_whole(token, LARGEST_ID, f"{name}[]") for token in _typed(value, list, name)]


def _typed(value: Any, kind: type[T], name: str) -> T:
    if not isinstance(value, kind):
        raise _Wrong(f"{name} is {{}}, not of the type {kind.__name__}", value)
    return value


def _whole(value: Any, most: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _Wrong(f"{name} is {{}}, no whole number from 0 to {most}", value)
    return value


# ---- many at a time ------------------------------------------------------------------------------
def ask_all(
    asks: Sequence[Callable[[], T]],
    concurrency: int,
    should_stop: Callable[[], bool],
    on_answer: Callable[[int, T], None] = lambda i, answer: None,
) -> list[T]:
    """Call all functions, several at a time in threads -> what they return, in their order.

    The first that raises ends all. Whatever ends them early, requests that are under way are broken
    off, and no thread holds the end of the process. Answers that have come are handed on, unless
    on_answer itself has raised.

    concurrency: calls at a time, of which MOST_AT_ONCE are made.
    should_stop(): asked ten times a second. Once it returns True, StopRequested is raised.
    on_answer(i, answer): called in the caller's thread as soon as answer i is there.

    Raises what a function has raised.
    """
    cancel = Cancel()
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    came: queue.SimpleQueue[_Came[T]] = queue.SimpleQueue()
    for i in range(len(asks)):
        waiting.put(i)
    work = partial(_work, asks, waiting, came, cancel)
    threads = [
        threading.Thread(target=Context().run, args=(work,), name="ask", daemon=True)
        for _ in range(min(concurrency, len(asks), MOST_AT_ONCE))
    ]
    found: dict[int, T] = {}
    errors: list[BaseException] = []

    def hand_on(seconds: float) -> None:
        """Hand the next answer to the caller, if one comes in so many seconds."""
        try:
            i, answer, error = came.get(timeout=seconds)
        except queue.Empty:
            return
        if error is not None:
            errors.append(error)
            return
        found[i] = answer  # type: ignore[assignment]  # there is one, without an error
        on_answer(i, found[i])

    stopped = False
    try:
        for thread in threads:
            thread.start()
        while len(found) < len(asks) and not errors and not (stopped := should_stop()):
            hand_on(LOOK_EVERY)
    finally:
        cancel()
        _wait_a_moment(threads)
    for _ in range(came.qsize()):  # what has come is not lost
        hand_on(0.0)
    if stopped:
        raise StopRequested
    if errors:
        raise errors[0]
    return [found[i] for i in range(len(asks))]


def _work(
    asks: Sequence[Callable[[], T]],
    waiting: queue.SimpleQueue[int],
    came: queue.SimpleQueue[_Came[T]],
    cancel: Cancel,
) -> None:
    """Call one function after the other, until none waits or one has failed."""
    CANCEL.set(cancel)
    while not cancel.is_set:
        try:
            i = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            came.put((i, asks[i](), None))
        except BaseException as error:  # raised again in the caller's thread
            came.put((i, None, error))
            cancel()


def _wait_a_moment(threads: Sequence[threading.Thread]) -> None:
    """Let threads end whose requests were broken off, but wait for none that does not."""
    end = time.monotonic() + LAST_WAIT
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, end - time.monotonic()))
