"""Draws `architecture.svg`: which package imports which, read from the code. `make docs` runs it; a test compares.

The order of the rows is that of the layers in pyproject.toml, which `lint-imports` holds. A package may import those
below it only, so the grey half of the drawing stays empty; an import that breaks the rule would stand there in red.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
CELL, TOP, LEFT = 26, 128, 110  # pixels
STYLE = "text { font: 13px system-ui, sans-serif; fill: #1f2933 } .name { font-weight: 600 }"


def main() -> None:
    Path(__file__).with_name("architecture.svg").write_text(drawing())


def layers() -> list[str]:
    """The packages and ground modules from top to bottom: `latenttrain`, `latentprep.cli`, …"""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    return [name.strip() for layer in contract["layers"] for name in layer.split("|")]


def imports(packages: list[str]) -> set[tuple[str, str]]:
    """(importer, imported) of packages; imports inside functions count, those for type checkers alone do not."""
    graph = grimp.build_graph("latentprep", "latenttrain", exclude_type_checking_imports=True, cache_dir=None)

    def home(module: str) -> str:
        return next((name for name in packages if f"{module}.".startswith(f"{name}.")), "")

    return {(home(a), home(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}


def drawing() -> str:
    packages = layers()
    pairs = imports(packages)
    side = CELL * len(packages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + side + 50}" height="{TOP + side + 12}" role="img">',
        "<title>Which package imports which: a package imports those below it only</title>",
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        '<text x="12" y="24">A row imports the columns that are marked. Grey is forbidden:</text>',
        '<text x="12" y="42">a package imports those below it only.</text>',
    ]
    for i, package in enumerate(packages):
        y, x, name = TOP + CELL * i, LEFT + CELL * i, package.removeprefix("latentprep.")
        parts += [
            f'<text transform="translate({x + 17} {TOP - 8}) rotate(-60)">{name}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{CELL * (i + 1)}" height="{CELL}" fill="#e4e7eb"/>',
            f'<line x1="12" x2="{LEFT + side}" y1="{y}" y2="{y}" stroke="#cbd2d9"/>',
            f'<text class="name" x="12" y="{y + 17}">{name}</text>',
        ]
        for j, other in enumerate(packages):
            if i != j and (package, other) in pairs:
                colour = "#2f6fab" if j > i else "#c81e1e"
                parts.append(f'<circle cx="{LEFT + CELL * j + CELL // 2}" cy="{y + CELL // 2}" r="7" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
