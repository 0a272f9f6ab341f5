"""The page: plain HTML with everything inside it, no script, readable on light and dark screens and on paper.

Five functions of escaped text; a template of Jinja's would be as long, and a second language.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #626c77; --line: #d9dde2; --back: #ffffff; --soft: #f5f7f9;
  --link: #2159a6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --muted: #9aa5b1; --line: #363d46; --back: #15191e;
  --soft: #1d232a; --link: #82b1f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1.05rem; margin: 0 } p { margin: .4rem 0 } a { color: var(--link) }
.muted { color: var(--muted) } code, pre { font: 12.5px/1.45 ui-monospace, monospace }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap }
th { color: var(--muted); font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.wrap { white-space: normal } td.child { padding-left: 1.2rem }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0 }
figure { margin: .6rem 0; display: inline-block; background: #fff; border-radius: 6px; padding: .4rem; max-width: 100% }
figure img { display: block; max-width: 100%; height: auto } figcaption { color: #626c77; font-size: 12px }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--muted) }
pre { background: var(--soft); border-radius: 6px; padding: .8rem; overflow-x: auto; max-height: 32rem }
@media print { details { display: none } article { break-inside: avoid } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int) -> str:
    """A table of ready-made HTML cells; columns from number ``numeric`` on are numbers."""
    kinds = ['class="n"' if column >= numeric else "" for column in range(len(head))]
    top = "".join(f"<th {kind}>{cell}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def image(png: bytes, caption: str) -> str:
    """A figure, inline."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def folded(summary: str, text: str) -> str:
    """Long text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def link(address: str | None, text: str) -> str:
    """A link where there is an address, else the text."""
    return f'<a href="{escape(address, quote=True)}">{escape(text)}</a>' if address else escape(text)
