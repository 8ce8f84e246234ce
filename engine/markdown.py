"""Escape text for Markdown, so that what a model wrote can never become markup."""

from __future__ import annotations

import html

_ESCAPES = {code: "\ufffd" for code in (*range(32), 127)} | {ord("\t"): " ", ord("\n"): "<br>"}
_ESCAPES |= {ord(character): f"&#{ord(character)};" for character in "\\`*_[]|~#!"}
_ESCAPES |= {ord(character): html.escape(character) for character in "&<>\"'"}


def escape_markdown(text: str) -> str:
    """Escape text so that TensorBoard's Markdown shows it as it stands, also in tables.

    No markup and no HTML is left, and newlines become <br>.
    """
    # In one pass, because an entity must not be escaped again.
    return text.replace("\r\n", "\n").translate(_ESCAPES)
