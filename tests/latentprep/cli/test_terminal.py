"""What a terminal, a pipe or a signal can do to a run, and what names can do to a terminal."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import latentprep
import latenttrain
from faults import digest
from inprocess import command
from latentprep.cli import console
from latentprep.cli.terminal import orderly_signals
from latentprep.pictures import page
from latentprep.pictures.plots import drawn
from latentprep.pictures.sheet import Column, draw_sheet
from latentprep.progress import BYTES
from latentprep.text import shown

ROOT = Path(__file__).parents[3]
NAMES = ["<b>", ":smile:", "cat [a]", "cat [b]", "x[", "[/b]", "$x_1$", "a\x1b[31mb\nc"]


def run(*arguments: object, program: str = "latentprep", shell: str = "", **environment: str) -> tuple[int, str, str]:
    """Run a command, with `shell` (redirections) after it: exit code, stdout, stderr. In this process if it can be."""
    if not shell and not environment:
        ended = command(program, *arguments)
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended.returncode, ended.stdout, ended.stderr
    line = ["sh", "-c", f'exec "$@" {shell}', "-", sys.executable, "-m", program, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, env=os.environ | environment, timeout=120)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of classes whose names are hard to print."""
    root = tmp_path_factory.mktemp("names")
    for split in ("train", "val"):
        for i, name in enumerate(NAMES):
            folder = root / "photos" / split / name.replace("/", "∕")
            folder.mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (16, 16), (i * 30, k * 40, 99)).save(folder / f"{k}.png")
    code, out, _ = run(
        "encode", root / "photos", "--codec", "dct", "--size", 64, "--shard-rows", 8, "--out", root / "[blue]out"
    )
    assert code == 0
    assert f"wrote {root}/[blue]out\n" in out
    return root / "[blue]out"


def test_names_are_printed_as_they_are(made: Path) -> None:
    _, out, _ = run("info", made)
    for name in NAMES:
        assert shown(name.replace("/", "∕")) in out
    assert "\x1b" not in out
    assert set(json.loads(run("info", made, "--json")[1])["splits"]["val"]["samples"]) == {
        name.replace("/", "∕") for name in NAMES
    }


def test_text_on_a_terminal_is_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.print_table("[red]title", ["[b]name", "x[/b]"], [[name, ":smile:"] for name in NAMES])
    console.print_facts("[i]title", {"[u]fact": "x[/b] :tada:", "two\nlines": "\x1b]0;title\a"})
    out = capsys.readouterr().out
    for text in ("[red]title", "[b]name", "x[/b]", ":smile:", "cat [a]", "[i]title", "[u]fact", ":tada:"):
        assert text in out
    assert r"\x1b]0;title\x07" in out
    assert r"two\nlines" in out
    assert r"a\x1b[31mb\nc" in out


def test_bars_show_text_as_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with console.progress_bar("[red]read x[/b]", 2, "images") as bar:
        bar.advance(1, shard="[b]:smile:")
        bar.note("note [/b] :smile: \x1b[31m")
        bar.advance(1, shard="x[/b]")
    err = capsys.readouterr().err
    assert "[red]read x[/b]" in err
    assert "note [/b] :smile: \\x1b[31m" in err
    assert "shard x[/b]" in err


def test_lines_stand_for_bars_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_bar("encoding", 40, "images", 10) as bar:
        bar.advance(10)
        bar.note("a note")
        bar.advance(20, loss="0.5")
    assert capsys.readouterr().err.splitlines() == ["a note", "encoding: 40/40 loss 0.5"]
    with console.progress_bar("reading x", 3 << 20, BYTES) as bar:
        bar.advance(1 << 20)
        time.sleep(0.6)  # what has hardly begun has no rate
        bar.advance(2 << 20)
    assert re.fullmatch(r"reading x: 3.00 MiB/3.00 MiB [1-3]\.\d\d MiB/s\n", capsys.readouterr().err)
    with console.progress_bar("downloading x", None, BYTES) as bar:
        bar.advance(1)  # a server that does not say how much there is
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain, größer, 日本語 🙂", "plain, größer, 日本語 🙂"),
        ("a\tb\r\nc", r"a\tb\r\nc"),
        ("\x1b[2J\x9b31m\x7f", r"\x1b[2J\x9b31m\x7f"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\xe9"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("\ud800", r"\ud800"),
    ],
)
def test_shown(text: str, safe: str) -> None:
    assert shown(text) == safe


def test_only_console_prints() -> None:
    """So that no caller can forget that text is text."""
    for path in [*(ROOT / "latentprep").rglob("*.py"), *(ROOT / "latenttrain").rglob("*.py")]:
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "rich" for name in imported), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert "__version__" in ast.unparse(node), path


def test_pictures_and_pages_show_names_as_they_are() -> None:
    with drawn(1) as (axes, picture):
        axes[0].plot([1, 2], [1, 2], label="$x_1$ and \x1b $")
        axes[0].set_title("<b> $\\frac$")
        axes[0].legend()
    svg = picture("svg").decode()
    assert r"$x_1$ and \x1b $" in svg
    assert "&lt;b&gt; $\\frac$" in svg
    document = page.page("<b>", "\udcff", [page.table("$", ["a"], [["\x1b[1m"]])]).decode()
    assert "<b>" not in document
    assert r"\x1b[1m" in document
    pictures = Column("c\nd", np.zeros((1, 4, 4, 3), np.uint8))
    assert draw_sheet([pictures], ["a\nb\udcff"], "t\n\udcff").size[0] > 0


def test_report_and_preview_of_such_names(made: Path, tmp_path: Path) -> None:
    assert run("report", made, "--out", tmp_path / "[b]r.html")[0] == 0
    text = (tmp_path / "[b]r.html").read_text()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    code, out, _ = run("preview", made, "--out", tmp_path / "[b]p.png", "--no-show")
    assert code == 0
    assert f"wrote {tmp_path}/[b]p.png\n" in out


def test_a_terminal_that_is_not_utf8(made: Path) -> None:
    for encoding in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        code, out, _ = run("info", made, **encoding)
        assert code == 0
        assert out.isascii()
        assert "64x64 px" in out
        assert r"x[" in out and r"[\u2215b]" in out
        code, out, _ = run("info", made, "--json", **encoding)
        assert out.isascii()
        assert "[∕b]" in json.loads(out)["splits"]["val"]["samples"]
        assert run("encode", "--help", **encoding)[0] == 0


def test_a_name_that_is_no_text_at_all(made: Path) -> None:
    place = os.fsdecode(os.fsencode(made.parent / "caf") + b"\xe9")
    code, out, _ = run("convert", made, place, "--store", "wds")
    assert code == 0, out
    assert r"caf\xe9" in out
    assert json.loads(run("info", place, "--json")[1])["path"] == place


def test_work_goes_on_without_stderr(made: Path, tmp_path: Path) -> None:
    for number, shell in enumerate(("2>&-", "2>/dev/full")):
        code, out, err = run("convert", made, tmp_path / str(number), "--store", "wds", "--json", shell=shell)
        assert (code, err) == (0, "")
        assert json.loads(out)["encoded"] == 32
    assert run("info", tmp_path / "nosuch", shell="2>&-") == (6, "", "")


def test_results_that_cannot_be_printed_are_an_error(made: Path, tmp_path: Path) -> None:
    for arguments in (["info", made], ["info", made, "--json"], ["--help"]):
        code, _, err = run(*arguments, shell=">/dev/full")
        assert code == 8
        assert err.startswith("error: cannot write to standard output: no space left on device\nhint:")
    code, _, err = run("convert", made, tmp_path / "out", "--store", "wds", shell=">&-")
    assert (code, err.partition(",")[0]) == (8, "error: standard output is closed")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_error(made: Path) -> None:
    for arguments in (["info", made], ["info", made, "--json"], ["encode", "--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        line = [sys.executable, "-m", "latentprep", *map(str, arguments)]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, timeout=120)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_signals_that_are_ignored_stay_so_and_the_first_is_orderly() -> None:
    before = signal.getsignal(signal.SIGTERM)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with orderly_signals() as ended:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != before
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            assert ended.exit_code == 128 + signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process at once
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def stopped(command: list[str], number: signal.Signals, begun: Path) -> tuple[int, str]:
    """Run, send the signal once `begun` is there: exit code and stderr."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore SIGINT
    )  # fmt: skip
    try:
        while process.poll() is None and not begun.exists():
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in err
    return process.returncode, err


def stopped_here(arguments: list[str], number: signal.Signals, begun: Path) -> tuple[int, str]:
    """The same in this process, whose own handler is one that does nothing."""
    over = threading.Event()

    def send() -> None:
        while not over.is_set() and not begun.exists():
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: None)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        done = command("latentprep", *arguments)
    finally:
        over.set()
        sender.join()
        signal.signal(number, before)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_second_signal_ends_process_1_of_a_container_at_once() -> None:
    code = "import os, signal, time; os.getpid, me = lambda: 1, os.getpid(); "
    code += "from latentprep.cli.terminal import orderly_signals\n"
    code += "with orderly_signals():\n    try: os.kill(me, 15); time.sleep(9)\n"
    code += "    finally: print(signal.getsignal(15) != signal.SIG_DFL, flush=True); os.kill(me, 15); time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "True\n"), done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the encode below makes that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    latentprep.encode("shapes", limit=100, codec="dct", size=64, shard_rows=8, out=out)
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_an_encode_in_order(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["encode", "shapes", "--limit", "100", "--codec", "dct", "--size", "64", "--shard-rows", "8"]
    arguments += ["--out", str(out)]
    if number == signal.SIGTERM:
        code, err = stopped([sys.executable, "-m", "latentprep", *arguments], number, out / "records")
    else:
        code, err = stopped_here(arguments, number, out / "records")
    assert code == 128 + number
    assert "shards are committed\nhint:  run the same command again" in err
    latentprep.encode("shapes", limit=100, codec="dct", size=64, shard_rows=8, out=out)
    assert digest(out) == digest(whole)


def test_a_signal_inside_of_exec_ends_with_its_own_code() -> None:
    code = "import os, time; from latentprep.cli.console import run; "
    code += "run(lambda: exec('os.kill(os.getpid(), 15); time.sleep(9)'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[0]) == (128 + signal.SIGTERM, "error: interrupted")


def test_a_signal_ends_a_fit_in_order(made: Path, tmp_path: Path) -> None:
    number = signal.SIGTERM
    fit = [sys.executable, "-m", "latenttrain.cli", "fit", str(made), "--epochs", "5", "--width", "0.25"]
    fit += ["--depth", "0.5", "--batch-size", "4", "--resume", "--out"]
    code, err = stopped([*fit, str(tmp_path / "run")], number, tmp_path / "run" / "metrics.jsonl")
    assert code == 128 + number
    assert "error: interrupted; whole epochs are kept" in err
    for out in ("run", "whole"):
        latenttrain.fit(made, epochs=5, width=0.25, depth=0.5, batch_size=4, resume=True, out=tmp_path / out)
    assert (tmp_path / "run/best.safetensors").read_bytes() == (tmp_path / "whole/best.safetensors").read_bytes()
