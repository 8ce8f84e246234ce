"""Check the address of an inference server before anything is sent there.

What goes to a server are images of patients. So an address must say one machine, in one way that
all programs read alike, and hold no credential. Whatever is shown of it, or of a server's text, is
one line.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "VLLM_API_KEY"  # the environment variable that holds a server's key
MOST_SAID = 300  # characters of a text that are shown
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:%-]+)*/?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_OWN_NETWORK = ipaddress.IPv4Network("127.0.0.0/8")
_OWN_ADDRESS = ipaddress.IPv6Address("::1")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def url_problems(url: str, allow_remote: bool) -> list[str]:
    """List what is wrong with a server's address, one line each, never quoting a credential.

    Without allow_remote only this machine's own addresses pass: localhost, 127.0.0.0/8 and ::1.
    Other machines are asked by https alone. Hosts are names in ASCII or addresses in their usual
    form: what some programs read as an address and others as a name (127.1, 2130706433, 0x7f.1) is
    refused.

    url: such as http://127.0.0.1:8000, with or without the /v1 at the end.
    allow_remote: whether images may leave this machine.
    """
    problem = _form_problem(url)
    if problem:
        return [problem]
    parts = urlsplit(url)
    host = parts.hostname or ""
    problem = _host_problem(host, bracketed="[" in parts.netloc)
    if problem:
        return [f"{shown_url(url)}: {problem}"]
    problems = []
    if not is_loopback(host):
        if not allow_remote:
            problems.append(
                f"{shown_url(url)} is not this machine (localhost, 127.0.0.1 or ::1): images would"
                " leave it. Where their terms of use permit that (MIMIC-CXR's forbid third parties"
                " and online services), give --allow_remote_server"
            )
        if parts.scheme != "https":
            problems.append(
                f"{shown_url(url)}: another machine is asked by https alone, for images and the key"
                " would be read on the way; or reach it by an ssh tunnel to localhost"
            )
    return problems


def _form_problem(url: str) -> str | None:
    """Say what is wrong with the parts of an address, before a host is looked at."""
    shown = shown_url(url)
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return (
            f"{shown}: an address has no blanks, backslashes, control characters or letters"
            " beyond ASCII; write a name with such letters in its ASCII form (xn--...)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{shown} is no address of a server: {error}"
    if "@" in url:
        return (
            f"{shown} holds a credential, which config.json and `ps` would show; put the key"
            f" into the environment variable {KEY_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{shown} is no address of a server, such as http://127.0.0.1:8000"
    if port == 0 or parts.netloc.endswith(":"):
        return f"{shown}: a port is a number from 1 to 65535"
    if "?" in url or "#" in url:
        return f"{shown}: the address of a server has no ? and no #"
    segments = parts.path.split("/")
    if not _PATH.fullmatch(parts.path) or "." in segments or ".." in segments:
        return f"{shown}: the path {cut(parts.path)!r} is not one of a server"
    return None


def _host_problem(host: str, bracketed: bool) -> str | None:
    """Say what is wrong with a host, in lower case and without brackets."""
    if bracketed:
        try:
            address: Any = ipaddress.IPv6Address(host)
        except ValueError:
            return f"{cut(host)!r} is no IPv6 address"
        if address.scope_id is not None:
            return f"{host!r} names a network card; give the address alone"
    else:
        labels = host.split(".")
        if not _NUMBER.fullmatch(labels[-1]):
            if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
                return f"{cut(host)!r} is no name of a host"
            return None
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            return (
                f"{cut(host)!r} is no IPv4 address: write four decimal numbers, such as 127.0.0.1"
            )
    if address.is_unspecified:
        return f"{host} stands for all addresses that a server listens at; give 127.0.0.1 or ::1"
    return None


def is_loopback(host: str) -> bool:
    """Tell whether a host without problems is this machine, whatever a name server says."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    # not is_loopback: whether an IPv4 address within an IPv6 one counts depends on Python's version
    return address in _OWN_NETWORK if address.version == 4 else address == _OWN_ADDRESS


def shown_url(url: str) -> str:
    """Write an address without what stands before its @, where a credential would be."""
    return cut(re.sub(r"(?s)^(\w+:)?(//)?.*@", r"\1\2***@", url))


def clean(text: str) -> str:
    """Write a text in one line, without control characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def cut(text: str, most: int = MOST_SAID) -> str:
    """Write a text in one line of so many characters at most."""
    text = clean(text)
    return text if len(text) <= most else text[: most - 3] + "..."
