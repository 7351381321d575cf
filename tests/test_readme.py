"""Every command and every line of Python that the README and the pages of docs/ show, run (on fewer images)."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

import inprocess
import latentprep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("encode", "train", "look", "share", "extend"))]
SMALLER = {  # what makes a command take a moment; of an option given twice the last counts
    r"latentprep encode shapes": "--limit 60",
    r"latentprep verify .* --source": "--limit 60 --samples 4",
    r"latentprep rd": "--images 4 --bits 2,4 --rates 1 --qualities 20,80",
    r"latentprep linear-decoder fit": "--samples 40",
    r"latenttrain (fit|sweep)": "--epochs 1",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take as given: the dataset that the README's first command makes, photos/ and photo.jpg."""
    folder = tmp_path_factory.mktemp("prepared")
    latentprep.encode("shapes", codec="scatter", limit=60, out=folder / "shards")
    latentprep.decode(folder / "shards", out=folder / "decoded", split="train", format="jpeg")
    (folder / "decoded" / "train").rename(folder / "photos")
    shutil.rmtree(folder / "decoded")
    shutil.copy(next((folder / "photos").rglob("*.jp*g")), folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_line_of_python_runs(
    page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    ran = 0
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        if language == "python":
            exec(re.sub(r"\blimit=\d+", "limit=60", re.sub(r"\bepochs=\d+", "epochs=1", block)), {})
            ran += 1
            continue
        for command in filter(None, map(smaller, block.splitlines())):
            assert not re.search(r"[|&;<>*$`]", command), f"nothing that a shell would do: {command}"
            done = inprocess.command(*shlex.split(command), cwd=folder)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert done.stdout
            ran += 1
    assert ran >= 3


def smaller(line: str) -> str:
    """The line as the test runs it; empty if it is none of ours."""
    if not line.startswith(("latentprep ", "latenttrain ")):
        return ""
    return " ".join([line.partition("  #")[0], *(more for start, more in SMALLER.items() if re.match(start, line))])


CHECKS = {
    "zarr": """
import latentprep
expected = latentprep.open("shards").load("train")
assert (codes == expected.codes).all() and (labels == expected.labels).all()
assert (latents == latentprep.open("shards").quantizer.dequantize(expected.codes)[:, 0]).all()
""",
    "wds": """
import latentprep, urllib.parse
expected = latentprep.open("shards-tars").load("train")
samples = list(samples)
assert [urllib.parse.unquote(key) for key, _, _ in samples] == expected.keys and len(samples) == 100
assert (numpy.stack([codes for _, codes, _ in samples]) == expected.codes[:, 0]).all()
assert [label for _, _, label in samples] == expected.labels.tolist()
""",
    "parquet": """
import latentprep
expected = latentprep.open("shards-parquet").load("train")
assert (codes == expected.codes).all() and (labels == expected.labels).all()
""",
}


@pytest.mark.parametrize(
    ("place", "store", "equal_bits"), [(0, "zarr", None), (1, "wds", None), (1, "wds", True), (2, "parquet", None)]
)
def test_the_readers_in_the_specification_read(
    place: int, store: str, equal_bits: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[place]
    out = {"zarr": "shards", "wds": "shards-tars", "parquet": "shards-parquet"}[store]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    latentprep.encode(
        "shapes", codec="dct", equal_bits=equal_bits, limit=100, views=2, shard_rows=60, store=store,
        out=tmp_path / out,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(code + CHECKS[store], {})


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert target in targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(document: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", document.read_text()):
        if not link.startswith("http"):
            target = document.parent / link if link else document
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor


def test_packages_and_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = set(re.findall(r"^\| `(?:latentprep/)?(\w+)`", text.split("## Packages")[1].split("\n## ")[0], re.M))
    built = {path.stem if path.is_file() else path.name for path in (ROOT / "latentprep").iterdir()}
    assert packages == {name for name in built if not name.startswith("__") and name != "py"} | {"latenttrain"}
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(path.as_posix().endswith(f"/{name}") for path in ROOT.rglob("*.py")), name
