"""Every command and every line of Python that the README shows, run as it stands (on fewer images)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import inprocess
import latentprep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_commands_run(folder: Path) -> None:
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    ours = [command for command in commands if command.startswith(("latentprep", "latenttrain"))]
    assert len(ours) >= 5
    for command in ours:
        smaller = command.replace("encode shapes", "encode shapes --limit 60")
        smaller = re.sub(r"--epochs \d+", "--epochs 1", smaller)
        assert not re.search(r"[|&;<>*$`]", smaller), f"nothing that a shell would do: {command}"
        done = inprocess.command(*shlex.split(smaller), cwd=folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout


def test_the_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(folder)
    exec(re.sub(r"\blimit=\d+", "limit=60", re.sub(r"\bepochs=\d+", "epochs=1", code)), {})


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
}


@pytest.mark.parametrize(("place", "store"), list(enumerate(CHECKS)))
def test_the_readers_in_the_specification_read(
    place: int, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[place]
    out = "shards" if store == "zarr" else "shards-tars"
    latentprep.encode(
        "shapes", codec="dct", limit=100, views=2, shard_rows=60, store=store, out=tmp_path / out
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


def test_rooms_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("```")[1]
    tree = {path.name for path in ROOT.rglob("*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert len(named) > 25
    assert named <= tree, named - tree
