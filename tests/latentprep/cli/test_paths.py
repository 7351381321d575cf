"""Paths as users write them: ~, no home, names that are no text."""

from __future__ import annotations

from pathlib import Path

import pytest

import latentprep
import latenttrain
from inprocess import command
from latentprep.codecs.autoencoder import find_weights
from latentprep.errors import CodecError, SourceError, SystemFault, UsageError
from latentprep.pictures.preview import preview
from latentprep.pictures.report import report
from latentprep.sources.source import open_source
from latentprep.storage.cache import cache_folder
from latentprep.storage.places import path_of, place


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user that the system does not know."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "LATENTPREP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


def test_home_is_meant_everywhere(home: Path, tmp_path: Path) -> None:
    latentprep.encode("shapes", limit=20, codec="dct", size=64, out="~/shards")
    assert latentprep.verify("~/shards").ok
    latentprep.decode(latentprep.open("~/shards"), out="~/decoded", limit=2)
    preview("~/shards", out="~/p.png", limit=2)
    latenttrain.fit("~/shards", epochs=1, width=0.25, out="~/run")
    latenttrain.evaluate("~/run", "~/shards")
    image = next((home / "decoded").rglob("*.png"))
    (home / "x.png").write_bytes(image.read_bytes())
    assert latenttrain.predict("~/run", ["~/x.png", "~nosuchuser/x.png"])[0].classes
    report("~/shards", out="~/r.html", samples=2)
    latenttrain.report(["~/run"], dataset="~/shards", out="~/runs.html")
    with pytest.raises(SourceError, match=f"no such file or folder: {home}/none"):
        open_source("imagenette", data="~/none")
    with pytest.raises(CodecError, match="no model folder"):
        find_weights("~/none", "taesd")
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == {
        "shards",
        "decoded",
        "p.png",
        "run",
        "x.png",
        "r.html",
        "runs.html",
    }
    assert not list(tmp_path.glob("~*"))


def test_a_user_that_is_not_there(home: Path) -> None:
    for call in (path_of, place, latentprep.open, open_source, lambda p: find_weights(p, "taesd")):
        with pytest.raises(UsageError, match="there is no user nosuchuser"):
            call("~nosuchuser/x")
    Path("~$draft.png").touch()  # a file that a shell's * gives
    assert path_of("~$draft.png") == Path("~$draft.png")
    with pytest.raises(UsageError, match="zero byte"):
        path_of("a\0b")


def test_no_home_at_all(homeless: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="HOME is not set"):
        path_of("~/x")
    with pytest.raises(SystemFault, match="LATENTPREP_CACHE"):
        cache_folder()
    latentprep.encode("shapes", limit=20, codec="dct", size=64, out=tmp_path / "out")
    assert latentprep.verify(tmp_path / "out").ok


def test_commands_of_a_user_without_name_and_home(homeless: None) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = command("latentprep", *arguments)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, err = run("encode", "~/photos")
    assert (code, err.splitlines()[0]) == (2, "error: ~/photos: the home folder is unknown: HOME is not set")
    code, err = run("encode", "imagenette")
    assert (code, err.splitlines()[0]) == (8, "error: there is no home folder to keep downloads in")
    assert run("encode", "shapes", "--limit", "20", "--codec", "dct", "--size", "32")[0] == 0
