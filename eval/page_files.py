"""Write the files of a page: report.html, report.md, and pictures for the latter."""

from __future__ import annotations

from pathlib import Path

from eval.page import Page, picture_file
from eval.page_html import to_html
from eval.page_text import to_markdown


def write_page(page: Page, folder: Path) -> None:
    """Write report.html, report.md, the pictures that the latter names and the page's files."""
    (folder / "report.html").write_text(to_html(page), encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(page, "pictures"), encoding="utf-8")
    for name, text in page.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for picture in page.pictures():
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / picture_file(picture)).write_bytes(picture.data)
