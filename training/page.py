"""HTML that cannot be broken by what it shows: text is escaped unless it is `Html` already.

Leaves out: scripts, web fonts, anything that a page would fetch.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("report.css")


class Html(str):
    """Markup, as `tag` makes it; every other string is text."""


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element; `class_="wide"` becomes class="wide". Children that are no Html are escaped, attributes always."""
    inside = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{inside}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Parts one after another, each escaped unless it is Html."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def section(title: str, *children: str, about: str = "") -> Html:
    """A headed part of the page; `about` says in plain words what it shows."""
    lead = [tag("p", about, class_="about")] if about else []
    return tag("section", tag("h2", title), *lead, *children)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> Html:
    """Rows of cells; on a phone every cell bears its column's name, so that the table can fold into cards."""
    body = [
        tag("tr", *(tag("td", cell, data_label=name) for name, cell in zip(head, row, strict=True))) for row in rows
    ]
    names = tag("thead", tag("tr", *(tag("th", name) for name in head)))
    return tag("div", tag("table", names, tag("tbody", *body), class_=class_), class_="scroll")


def document(title: str, *body: str) -> str:
    """A whole page that needs nothing beside itself."""
    head = join(
        [
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            Html(f"<style>{STYLE.read_text('utf-8')}</style>"),
        ]
    )
    page = tag("html", tag("head", head), tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{page}\n"
