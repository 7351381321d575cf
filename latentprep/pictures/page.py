"""Self-contained HTML pages: no network, no script, light and dark, for any width of screen.

Every function here returns a piece of HTML; all text in it is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from latentprep.pictures.plots import COLOURS, GREY, GRID, INK
from latentprep.text import shown

if TYPE_CHECKING:
    from PIL.Image import Image


class Picture(Protocol):
    """What `plots.drawn` yields."""

    def __call__(self, format: str) -> bytes: ...


# The plots' colours as variables, and their dark counterparts. As text, all have a contrast of 4.5:1 or more.
_DARK = ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#d29922")
_VARIABLES = {INK: "ink", "#000000": "ink", GRID: "line", GREY: "grey"}
_VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
_STYLE = """
:root{color-scheme:light dark;--paper:#f6f8fa;--card:#ffffff;--ink:#24292f;--muted:#59636e;--line:#d8dee4;
--grey:#6e7781;--heat:#1f6feb;LIGHT}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--card:#161b22;--ink:#e6edf3;--muted:#9da7b3;--line:#30363d;
--grey:#9198a1;--heat:#1f6feb;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.15rem;margin:0 0 .5rem}
h3{font-size:1rem;margin:1.25rem 0 .5rem}
p{margin:.25rem 0 .75rem;max-width:48rem}
.muted,figcaption{color:var(--muted)}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;margin:1rem 0}
.scroll{overflow-x:auto;margin:.25rem 0 .75rem}
.scroll:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;white-space:nowrap}
td.n,th.n{text-align:right}
td.wide{white-space:normal;min-width:14rem}
dl{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr;gap:.25rem 1rem;margin:.5rem 0}
dt{color:var(--muted)}dd{margin:0}
figure{margin:0}figcaption{font-size:.875rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem}
.charts svg{display:block;width:100%;height:auto;max-width:30rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,COLUMNS),1fr));gap:1rem}
.tiles{display:flex;flex-wrap:wrap;gap:.375rem}
.tiles figure{width:5.5rem}
.tiles img{display:block;width:5.5rem;height:auto;border-radius:.125rem}
.tiles img.exact{image-rendering:pixelated}
.tiles figcaption{font-size:.75rem;line-height:1.3;margin-top:.125rem}
.card h3{margin:0 0 .25rem;font-size:.875rem}
"""


def page(title: str, lead: str, sections: Sequence[str]) -> bytes:
    """The whole document. title, lead: texts; sections: from `section`."""
    style = _STYLE.replace("LIGHT", ";".join(f"--c{i}:{colour}" for i, colour in enumerate(COLOURS)))
    style = style.replace("DARK", ";".join(f"--c{i}:{colour}" for i, colour in enumerate(_DARK)))
    style = style.replace("COLUMNS", "34rem")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="muted">{escape(lead)}</p>\n' + "\n".join(sections) + "\n</main>\n"
        "</body>\n</html>\n"
    ).encode()


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def facts(pairs: dict[str, str]) -> str:
    """Names and values."""
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items()) + "</dl>"
    )


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], heat: Sequence[Sequence[float]] | None = None
) -> str:
    """A table that scrolls inside its own box if the screen is narrow. Its first column names the rows.

    heat: 0…1 for each cell except the first of a row: how strongly it is coloured.
    """
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = "".join(f'<th scope="col"{_right(n)}>{escape(name)}</th>' for name, n in zip(columns, numeric, strict=True))
    body = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for i, text in enumerate(row[1:], 1):
            share = 0.0 if heat is None else heat[number][i - 1]
            # At most 40% blue under the text: a contrast of 4.5:1 or more, light and dark.
            style = f' style="background:color-mix(in srgb,var(--heat) {40 * share:.0f}%,var(--card))"' if share else ""
            wide = ' class="wide"' if len(text) > 40 else _right(numeric[i])
            cells.append(f"<td{wide}{style}>{escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n"
        "</tbody></table></div></figure>"
    )


def charts(figures: Sequence[str], small: bool = False) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="charts{" small" if small else ""}">' + "".join(figures) + "</div>"


def chart(picture: Picture, alt: str, caption: str = "") -> str:
    """A plot as inline SVG whose colours follow the page's, in the page's typeface. alt: what it shows, in words."""
    svg = picture("svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.S)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    alt = escape(alt)
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{alt}"><title>{alt}</title>', svg, count=1)
    svg = re.sub(r"fill: #ffffff", "fill: none", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<text style=\"(?![^\"]*fill)", '<text style="fill: var(--ink); ', svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    # Names must be unique on the page: drop those that nothing refers to, rename the others.
    names = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in names else "", svg)
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    for name in names:
        svg = re.sub(rf'(id="|url\(#|href="#){re.escape(name)}\b', rf"\g<1>{prefix}{name}", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("xlink:href", "href")
    return f"<figure>{svg}{_caption(caption)}</figure>"


def card(title: str, tiles: Sequence[str]) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3><div class="tiles">{"".join(tiles)}</div></div>'


def cards(every: Sequence[str]) -> str:
    return '<div class="cards">' + "".join(every) + "</div>"


def tile(picture: Image, alt: str, caption: str = "", exact: bool = False, flac: bytes = b"") -> str:
    """A small picture, inside the page. exact: a PNG whose pixels stay visible; otherwise a JPEG. flac: the sound that
    it is a picture of, which gets a player."""
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG"} if exact else {"format": "JPEG", "quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, exactly = ("png", ' class="exact"') if exact else ("jpeg", "")
    player = ""
    if flac:
        source = f"data:audio/flac;base64,{base64.b64encode(flac).decode()}"
        player = f'<audio controls preload="none" style="width:{picture.width}px;display:block" src="{source}"></audio>'
    return (
        f'<figure><img{exactly} src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{picture.width}" '
        f'height="{picture.height}">{player}{_caption(caption)}</figure>'
    )


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.lstrip("+-−±")[:1].isdigit()


def escape(text: str) -> str:
    return html.escape(shown(text))
