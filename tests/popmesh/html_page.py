"""Reads the pages that drills write, as a browser would have to."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what it meets."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def check_needs_nothing_else(self) -> None:
        """No script, and nothing that a browser would fetch."""
        assert not [tag for tag, _ in self.tags if tag in ("script", "link", "img", "iframe")]
        for _, attributes in self.tags:
            assert not attributes.keys() & {"src", "href", "srcset"}
        style = "".join(self.words)
        assert "prefers-color-scheme: dark" in style
        assert "url(" not in style
        assert "@import" not in style


def read_page(text: str) -> Page:
    """The page, whole: every tag is closed."""
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page
