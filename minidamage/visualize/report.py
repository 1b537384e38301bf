"""One HTML file with tables and pictures inside it: no script, no link to anything outside, readable in light and dark.

    write_report("report.html", "damagenet on the demo set", [
        ("Accuracy", ["Test part, 40 pictures.", Table(["class", "AP50"], [["dent", 0.61]]), Picture(pr_curve, "Masks")])])
"""
import base64
import dataclasses
import html
import io
import math
import os
import re

import numpy as np
from PIL import Image

from minidamage.visualize.overlay import to_picture, write_beside

LARGEST_PNG = 500_000                         # bytes: a picture given as an array that needs more is embedded as JPEG
NUMBER = r"[-+]?\d[\d,]*(\.\d+)?%?"


@dataclasses.dataclass
class Table:
    """columns: C headings. rows: lists of C cells: text, int, float (`digits` decimals), None or NaN ("n/a")."""

    columns: list
    rows: list
    caption: str = ""
    digits: int = 3


@dataclasses.dataclass
class Picture:
    """image: uint8 [H, W, 3], the bytes of a PNG or JPEG file, or its path. wide: as wide as the page, else its own size. titled: the
    picture itself shows its caption, which is then for those who cannot see it."""

    image: object
    caption: str = ""
    wide: bool = False
    titled: bool = False


def write_report(path, title, sections, subtitle=""):
    """Writes the report and returns its path; an older report of that name is replaced only once the new one is whole.

    sections: list of (heading, blocks); a block is a text (one paragraph; `code` in backticks), a dict (names and values), a
    Table or a Picture. Raises ValueError for another kind of block and for a picture that is neither PNG nor JPEG.
    """
    parts = []
    for number, (heading, blocks) in enumerate(sections):
        body = "\n".join(_block(block) for block in ([blocks] if isinstance(blocks, (str, dict, Table, Picture)) else blocks))
        parts.append(f'<section id="part{number}">\n<h2>{_escaped(heading)}</h2>\n{body}\n</section>')
    links = "".join(f'<li><a href="#part{number}">{_escaped(heading)}</a></li>' for number, (heading, _) in enumerate(sections))
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(sections) > 2 else ""
    page = PAGE.format(title=_escaped(title), style=STYLE, contents=contents, sections="\n".join(parts),
                       subtitle=f'<p class="subtitle">{_text(subtitle)}</p>' if subtitle else "")
    write_beside(path, lambda stream: stream.write(page.encode("utf-8", "backslashreplace")))
    return os.fspath(path)


def _block(block):
    if isinstance(block, str):
        return f"<p>{_text(block)}</p>"
    if isinstance(block, dict):
        rows = "".join(f'<tr><th scope="row">{_escaped(name)}</th><td>{_cell(value, 3)}</td></tr>' for name, value in block.items())
        return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        return _picture(block)
    raise ValueError(f"expected a text, a dict, a Table or a Picture in a report's section, got {type(block).__name__}")


def _table(table):
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"expected {len(table.columns)} cells a row ({', '.join(map(str, table.columns))}), got {len(row)}: {row}")
    numeric = [bool(table.rows) and all(_is_number(row[c]) for row in table.rows) for c in range(len(table.columns))]
    kinds = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f'<th scope="col"{kind}>{_escaped(name)}</th>' for name, kind in zip(table.columns, kinds))
    rows = "\n".join("<tr>" + "".join(f"<td{kind}>{_cell(cell, table.digits)}</td>" for cell, kind in zip(row, kinds)) + "</tr>"
                     for row in table.rows)
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _is_number(value):
    """Whether a cell is set as a number: one, none, or a text of one such as "61.30" or "0.52 ± 0.03"."""
    return not isinstance(value, str) or bool(re.fullmatch(NUMBER + f"( ± {NUMBER})?", value))


def _cell(value, digits):
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return '<span class="none">n/a</span>'
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.{digits}f}"
    return _text(str(value))


def _picture(picture):
    data, kind, (width, height) = _encoded(picture.image)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption and not picture.titled else ""
    style = ' class="wide"' if picture.wide else ""
    return (f'<figure{style}><img src="{source}" width="{width}" height="{height}" '
            f'alt="{html.escape(picture.caption or "picture")}">{caption}</figure>')


def _encoded(image):
    """(bytes, "png" or "jpeg", (width, height)) of an array, of a file's bytes, or of a path."""
    if isinstance(image, (bytes, bytearray)):
        data, name = bytes(image), "the bytes given"
    elif isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        with open(image, "rb") as stream:
            data = stream.read()
    else:
        pixels = Image.fromarray(to_picture(image))
        data, name = _saved(pixels, format="PNG", optimize=True), "the array given"
        if len(data) > LARGEST_PNG:
            data = _saved(pixels, format="JPEG", quality=90)
    kind = "png" if data[:8] == b"\x89PNG\r\n\x1a\n" else "jpeg" if data[:3] == b"\xff\xd8\xff" else None
    if kind is None:
        raise ValueError(f"{name}: expected a PNG or JPEG picture for the report, got other data; save it as .png or .jpg")
    return data, kind, Image.open(io.BytesIO(data)).size


def _saved(picture, **options):
    stream = io.BytesIO()
    picture.save(stream, **options)
    return stream.getvalue()


def _escaped(text):
    return html.escape(str(text), quote=False)


def _text(text):
    """Escaped, with `code` in backticks and line breaks kept."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escaped(text)).replace("\n", "<br>\n")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{subtitle}
{contents}
{sections}
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1d2126; --soft: #5b636d; --line: #dde1e6; --paper: #ffffff; --card: #f5f7f9; --link: #0059b3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a0a8b2; --line: #3a4049; --paper: #15181c; --card: #1e2228; --link: #7db8ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
a { color: var(--link); }
.subtitle { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 1rem 0; list-style: none; }
code { font: .92em ui-monospace, Menlo, Consolas, monospace; background: var(--card); padding: .1em .3em; border-radius: .25em;
       overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
tbody td:first-child { white-space: nowrap; }
table.facts td { white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: var(--card); }
.facts th { color: var(--soft); font-weight: 400; white-space: nowrap; }
.number { text-align: right; padding-left: .4rem; white-space: nowrap; }
.none { color: var(--soft); }
figure { margin: 1.25rem 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; background: #fff; }
figure.wide img { width: 100%; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .4rem; max-width: 46rem; }
@media print { main { max-width: none; padding: 0; } section { break-inside: auto; } figure, tr { break-inside: avoid; } }
"""
