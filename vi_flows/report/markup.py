"""HTML elements as text: the few that a report needs, with everything escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

PIXELS = 96  # to the inch, in CSS
CSS = """
:root { color-scheme: light dark; --ink: #1d2125; --dim: #5b636b; --paper: #fff; --line: #d5d9dd; --soft: #f3f5f6;
  --reliable: #00694d; --corrected: #835800; --unreliable: #a83600; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --dim: #a3abb2; --paper: #16191c; --line: #3b4248;
  --soft: #20252a; --reliable: #4cc79f; --corrected: #e0aa45; --unreliable: #ff9363; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
.lead { font-size: 1.1rem; margin: .5rem 0; }
.wide { overflow-x: auto; margin: .25rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--dim); }
tbody th, th:first-child, th.words, td.words { text-align: left; }
tbody th { font-weight: 600; }
td.words { min-width: 14rem; }
figure { margin: .75rem 0; }
figcaption { color: var(--dim); font-size: .9rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
.several { display: flex; flex-wrap: wrap; gap: .75rem; }
.several figure { margin: 0; width: calc(50% - .375rem); max-width: 12rem; }
.several img { width: 100%; }
pre { overflow-x: auto; padding: .75rem; background: var(--soft); border-radius: .3rem; font-size: .85rem; }
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --paper: #fff; --line: #bbb; --soft: #fff;
    --reliable: #00694d; --corrected: #835800; --unreliable: #a83600; }
  body { max-width: none; padding: 0; font-size: 10pt; } .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  table { font-size: 8pt; } img, tr { break-inside: avoid; } h2, figcaption { break-after: avoid; } }
"""

# the policy holds a browser to what the page promises: nothing is fetched, nothing runs
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{header}
<main>
{main}
</main>
</body>
</html>
"""


def document(title: str, header: str, sections: Iterable[str]) -> str:
    """A whole page, of elements that are HTML already."""
    return DOCUMENT.format(title=escape(title), css=CSS, header=header, main="\n".join(sections))


def section(title: str, *parts: str) -> str:
    """A heading and what is below it, which is HTML already; empty parts are left out."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *filter(None, parts), "</section>"])


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """A list of sentences; nothing for none."""
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return f"<ul>\n{items}</ul>" if items else ""


def code_block(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A table whose columns and rows have headers, in a frame that scrolls where a screen is too narrow.

    words: heads of columns of text, which are set to the left.
    """
    kinds = [' class="words"' if head in words else "" for head in heads]
    top = "".join(f'<th scope="col"{kind}>{escape(head)}</th>' for head, kind in zip(heads, kinds, strict=True))
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    return (  # the caption stays where it is while the table scrolls
        f"<figure><figcaption>{escape(caption)}</figcaption>\n"
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table></div></figure>"
    )


def pairs(caption: str, heads: tuple[str, str], entries: Mapping[str, object]) -> str:
    """A table of names and what belongs to them, in words."""
    return table(caption, heads, [(name, str(value)) for name, value in entries.items()], words=heads)


def picture(png: bytes, inches: tuple[float, float], alt: str, caption: str = "") -> str:
    """A picture inside the page, at its own size or smaller; ``alt`` says what it shows to those who do not see it."""
    data = b64encode(png).decode()
    width, height = (round(PIXELS * side) for side in inches)
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f"<figure>{above}{image}</figure>"
