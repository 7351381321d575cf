from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inprocess import command
from pictures import make_folder

ROOT = Path(__file__).parents[3]


def latentprep(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return command("latentprep", *arguments, **options)  # type: ignore[arg-type]


def fails(code: int, *arguments: object, **options: object) -> str:
    """Run, expect the exit code and one clear error without traceback; returns stderr."""
    done = latentprep(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return done.stderr


def test_encode_info_and_resume(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = latentprep("encode", images, "--codec", "dct", "--size", 32, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "train 12, val 6" in done.stdout
    assert "encoding: 18/18" in done.stderr  # plain lines where stderr is no terminal
    assert "\x1b" not in done.stdout + done.stderr
    shown = latentprep("info", out)
    assert "class_1" in shown.stdout
    assert "exact mirror" in shown.stdout
    assert "dct:luma=10,chroma=3" in shown.stdout  # as --codec takes it
    facts = json.loads(latentprep("info", out, "--json").stdout)
    assert facts["splits"]["train"]["samples"] == {"class_0": 6, "class_1": 6}
    assert facts["complete"] is True
    assert facts["bits_per_value"] == pytest.approx(8 * facts["code_bytes"] / (18 * 16 * 4 * 4))
    sources = sum(path.stat().st_size for path in images.rglob("*.jpg"))
    assert facts["source_bytes"] == sources
    assert facts["smaller_than_source"] == pytest.approx(sources / facts["code_bytes"])
    again = latentprep("encode", images, "--codec", "dct", "--size", 32, "--out", out, "--json")
    assert json.loads(again.stdout)["encoded"] == 0


def test_exit_code_three_when_samples_are_invalid(images: Path, tmp_path: Path) -> None:
    (images / "train" / "class_0" / "000.jpg").write_bytes(b"junk")
    done = latentprep("encode", images, "--codec", "dct", "--size", 32, "--out", tmp_path / "out")
    assert done.returncode == 3
    assert "1 sample could not be read; see " in done.stderr
    assert "errors.jsonl" in done.stderr
    facts = json.loads(latentprep("info", tmp_path / "out", "--json").stdout)
    assert facts["splits"]["train"]["invalid"] == 1


def test_users_mistakes(images: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "--bits 4" in fails(2, "encode", images, "--codec", "dct", "--bits", 0, *out)
    assert "got 9" in fails(2, "encode", images, "--codec", "dct", "--bits", 9, *out)
    assert "--size 96 or --size 104" in fails(2, "encode", images, "--codec", "dct", "--size", 100, *out)
    assert "did you mean" in fails(5, "encode", images, "--codec", "dtc", *out)
    assert "no model folder" in fails(5, "encode", images, "--codec", "taesd", "--weights", "./absent", *out)
    assert "use --device" in fails(8, "encode", images, "--codec", "dct", "--device", "cuda:99", *out)
    assert "unknown device" in fails(2, "encode", images, "--codec", "dct", "--device", "tpu9", *out)
    assert "dct:luma must be a whole number" in fails(2, "encode", images, "--codec", "dct:luma=x", *out)
    fails(4, "encode", tmp_path / "absent", *out)
    fails(6, "info", tmp_path)
    assert not (tmp_path / "out").exists()
    (images / "train" / "empty").mkdir()
    assert "empty" in fails(4, "encode", images, "--codec", "dct", *out)
    one_class = make_folder(tmp_path / "one", classes=1)
    fails(4, "encode", one_class, "--codec", "dct", *out)


def test_refusal_to_resume_with_other_bits(images: Path, tmp_path: Path) -> None:
    latentprep("encode", images, "--codec", "dct", "--size", 32, "--out", tmp_path / "out")
    message = fails(6, "encode", images, "--codec", "dct", "--size", 32, "--bits", 3, "--out", tmp_path / "out")
    assert "bits is 4, but 3 was requested" in message
    assert "--overwrite" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_read_only_out(images: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission" in fails(8, "encode", images, "--codec", "dct", "--out", tmp_path / "locked" / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_stdout_that_is_full_or_closed_shows_no_traceback(images: Path, tmp_path: Path) -> None:
    latentprep("encode", images, "--codec", "dct", "--size", 32, "--out", tmp_path / "out")
    shown = f"{sys.executable} -m latentprep info {tmp_path / 'out'}"
    done = subprocess.run(f"{shown} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_codecs_listing() -> None:
    done = latentprep("codecs", "--json", "--size", 256, "--bits", 2)
    rows = {row["name"]: row for row in json.loads(done.stdout)["codecs"]}
    assert set(rows) >= {"sd-vae", "sdxl-vae", "taesd", "taesdxl", "taesd3", "taef1", "dct", "resample"}
    assert rows["sd-vae"]["latent"] == [4, 32, 32]
    assert rows["sd-vae"]["code_bytes"] == 1024
    assert rows["dct"]["options"] == {"luma": 10, "chroma": 3}


def test_the_help_of_encode_fits_on_a_screen() -> None:
    done = latentprep("encode", "--help", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    assert "--codec" in done.stdout
    lines = done.stdout.rstrip().splitlines()
    assert len(lines) <= 59
    assert max(map(len, lines)) <= 100


def test_encode_has_few_options() -> None:
    import typer

    from latentprep.cli.commands import app

    command = typer.main.get_command(app).commands["encode"]  # type: ignore[attr-defined]
    assert len([p for p in command.params if p.param_type_name == "option" and p.name != "help"]) <= 35


@pytest.mark.parametrize("program", ["latentprep", "latenttrain"])
def test_help_imports_nothing_heavy(program: str) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['{program}', '--help']\n"
        f"from {program}.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'zarr', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_format_imports_no_torch() -> None:
    code = (
        "import sys, latentprep, latentprep.format\n"
        "heavy = {'torch', 'diffusers', 'PIL', 'matplotlib', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_has_help_and_an_example() -> None:
    import typer

    found = 0
    for name in ("latentprep", "latenttrain"):
        module = __import__(f"{name}.cli", fromlist=["app"])
        groups = [typer.main.get_command(module.app)]
        for group in groups:
            for one in group.commands.values():  # type: ignore[attr-defined]
                assert one.help, one.name
                if getattr(one, "commands", None):
                    groups.append(one)
                    continue
                found += 1
                assert f"{name} " in one.help.partition("Example")[2], one.name
                for parameter in one.params:
                    assert getattr(parameter, "help", None), f"{name} {one.name} {parameter.name}"
    assert found > 15
