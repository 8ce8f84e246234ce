"""Read written pages as a browser would, and give texts that try to become markup."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></article><iframe src='//x.y'>",
    "[a](javascript:alert(1))",
    "![x](http://x.y/z.png)",
    "# head\n* item\n1. one\n---\n> quote",
    "**b** _i_ `c` ~~s~~ | cell | <!-- c -->",
    "https://x.y www.x.y a@b.cd",
    "&lt;b&gt; &amp;amp; &#60;u&#62;",
    "\x00\x1b[31m\u202e\u2066\ud800 end",
    "</script><style>*{display:none}</style>",
)


VOID = ("meta", "img", "source", "br", "input", "hr")  # elements without an end


class ParsedPage(HTMLParser):
    """Gather tags, attributes and texts of a page, and its scripts."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.scripts, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag  # every element is closed where it should be

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(
            data
        )
