"""What the HTML pages of drills share: one file that needs no script, no font and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d666f; --paper: #ffffff;
  --line: #d9dee3; --right: #3f83c4; --gap: #d3e3f3; --hit: #f0a135; --differs: #b98900;
  --bad: #c8322b; --fault: #8a63c9; --good: #1e7d46; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --paper: #14171a;
  --line: #343b42; --right: #5b9bd8; --gap: #23405c; --hit: #f2b25c; --differs: #d9ab2b;
  --bad: #ef6a62; --fault: #a98be0; --good: #54c284; } }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 8px; }
p { margin: 4px 0; } .soft, .axis { color: var(--soft); }
.passed { color: var(--good); } .failed { color: var(--bad); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
.fit { width: fit-content; max-width: 100%; box-sizing: border-box; }
table { border-collapse: collapse; } th, td { padding: 3px 12px 3px 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.prose { min-width: 22em; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.axis { fill: var(--soft); font-size: 11px; } .tick { stroke: var(--line); }
"""


def page(title: str, style: str, body: Iterable[str]) -> str:
    """A whole document; ``title`` is text, ``style`` and ``body`` are CSS and HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f"<style>{_STYLE}{style}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def items(texts: Sequence[str], kind: str) -> list[str]:
    """A list of texts; nothing when there are none."""
    if not texts:
        return []
    return [f'<ul class="{kind}">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>']


def keys(colors: Iterable[tuple[str, str]]) -> str:
    """What colours mean: (CSS variable, words)."""
    return "".join(
        f'<span class="key" style="background: var({color})"></span>{escape(text)}'
        for color, text in colors
    )


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Iterable[int],
    prose: Iterable[int] = (),
) -> str:
    """A table of texts; columns in ``numbers`` stand to the right, those in ``prose`` are sentences
    and stay legible on a narrow screen."""
    kinds = dict.fromkeys(numbers, " class=n") | dict.fromkeys(prose, " class=prose")

    def cell(tag: str, at: int, text: str) -> str:
        return f"<{tag}{kinds.get(at, '')}>{escape(text)}</{tag}>"

    def line(tag: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, at, text) for at, text in enumerate(texts))}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide fit"><table>{line("th", head)}\n{body}</table></div>'
