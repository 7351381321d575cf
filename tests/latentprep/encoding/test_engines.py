"""Whatever makes the shards, and whatever dies of it, a dataset has the bytes that one process makes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import Told

import clusters
import latentprep
from faults import committed, digest
from inprocess import command
from latentprep.codecs import make_codec
from latentprep.encoding.encode import EncodeResult
from latentprep.errors import CodecError, LatentError, SourceError, SystemFault, UsageError
from latentprep.sources.source import Source, open_source
from pictures import jpeg, make_folder, picture


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in nine shards of four; the fourth shard of train has a dark one."""
    root = make_folder(tmp_path_factory.mktemp("engines") / "images", train=12, val=6)
    (root / "train" / "class_1" / "000.jpg").write_bytes(jpeg(np.zeros((64, 64, 3), np.uint8)))
    return root


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The plug-in's codecs, here and in workers."""
    with clusters.plugin():
        yield


def encode(source: Path | Source, out: Path, codec: str = "dct", **options: Any) -> EncodeResult:
    return latentprep.encode(source, codec=codec, size=64, out=out, shard_rows=4, **options)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, str]:
    encode(source, source.parent / "whole")
    return digest(source.parent / "whole")


def test_two_processes_make_the_bytes_of_one(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    told = Told()
    made = encode(source, tmp_path / "out", devices="cpu:2", profile=True, progress=told)
    assert digest(tmp_path / "out") == whole
    assert (made.engine, made.workers, made.encoded) == ("processes", 2, 36)
    assert sum(told.steps) - 24 == 36  # those of calibration
    assert made.profile
    stages = {stage["stage"]: stage for stage in made.profile["stages"]}
    assert stages["codec"]["threads"] == 2
    assert stages["codec"]["seconds"] > 0
    again = encode(source, tmp_path / "out", devices="cpu:2")  # nothing to do, and no process started
    assert again.encoded == 0
    assert again.seconds < 1


def test_latents_do_not_depend_on_the_number_of_threads(assets: Path) -> None:
    """Else the bytes would depend on how many workers share the cores."""
    import torch

    images = torch.from_numpy(np.stack([picture(seed, 224, 224) for seed in range(3)])).permute(0, 3, 1, 2)
    before = torch.get_num_threads()
    for codec in (make_codec("dct"), make_codec("resample"), make_codec("taesd", weights=str(assets / "taesd"))):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(codec.encode(images))
        torch.set_num_threads(before)
        assert all(torch.equal(found[0], latents) for latents in found)


def test_a_worker_that_dies_costs_its_shard_and_a_shard_that_kills_three_is_named(source: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("x" * 9)
    codec = f"deadly:count={count},times=4"
    encode(source, tmp_path / "whole", codec)
    count.write_text("")
    with pytest.raises(SystemFault) as caught:
        encode(source, tmp_path / "out", codec, devices="cpu:2")
    assert caught.value.message.startswith("shard train 3 cannot be made: 3 workers died of it")
    assert "committed" in caught.value.hint
    there = committed(tmp_path / "out")
    assert there >= {("train", 0), ("train", 1), ("train", 2)}
    assert ("train", 3) not in there
    encode(source, tmp_path / "out", codec, devices="cpu:2")  # one dies
    assert count.read_text() == "x" * 4
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_error_in_a_worker_is_the_error_of_one_process(source: Path, tmp_path: Path) -> None:
    (bad := tmp_path / "images").mkdir()
    for path in source.rglob("*.jpg"):
        (bad / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (bad / path.relative_to(source)).write_bytes(path.read_bytes())
    encode(bad, tmp_path / "first", codec="grey")
    (bad / "val" / "class_1" / "002.jpg").write_bytes(b"junk")
    errors = []
    for devices in (None, "cpu:2"):
        with pytest.raises(SourceError) as caught:
            encode(bad, tmp_path / f"{devices}", "grey", strict=True, quantizer=tmp_path / "first", devices=devices)
        errors.append(str(caught.value))
        assert committed(tmp_path / f"{devices}")
    assert errors[0] == errors[1]
    assert "val/class_1/002.jpg" in errors[0]


class Program:
    """The command line in a process group of its own."""

    def __init__(self, source: Path, out: Path, *options: str) -> None:
        words = ["encode", source, "--codec", "slow", "--size", "64", "--shard-rows", "4", "--out", out, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latentprep", *map(str, words)],
            text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        until(lambda: list(out.glob("records/*.json")) or self.process.poll() is not None)


def until(happened: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_when_the_driver_is_interrupted_or_killed_no_worker_is_left(source: Path, tmp_path: Path) -> None:
    encode(source, tmp_path / "whole", "slow")
    out = tmp_path / "out"
    program = Program(source, out, "--devices", "cpu:2", "--json")
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does, to driver and workers
    _, said = program.process.communicate(timeout=30)
    assert program.process.returncode == 130
    assert "Traceback" not in said
    before = committed(out)
    assert f"error: interrupted: {len(before)} of 9 shards are committed" in said
    assert 0 < len(before) < 9
    until(lambda: not clusters.alive(program.process.pid), 20)

    (out / "records" / "train-000000.json").unlink()
    program = Program(source, out, "--devices", "cpu:2", "--json")
    program.process.kill()  # the driver alone
    program.process.communicate(timeout=30)  # its workers have closed the pipes
    until(lambda: not clusters.alive(program.process.pid), 20)
    assert committed(out) >= before - {("train", 0)}
    encode(source, out, "slow")
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"devices": "0,99"}, SystemFault, "is not available"),
        ({"devices": "cpu:0"}, UsageError, "devices must be all, numbers such as 0,1, or cpu:N, got 'cpu:0'"),
        ({"devices": "cpu:257"}, UsageError, "got 'cpu:257'"),
        ({"devices": "banana"}, UsageError, "got 'banana'"),
        ({"devices": []}, UsageError, "got ''"),
        ({"devices": [0, 0]}, UsageError, "names device 0 twice"),
        ({"devices": "cpu:2", "device": "cpu"}, UsageError, "give one of them"),
        ({"engine": "spark"}, UsageError, "engine must be local or ray, got spark"),
        ({"address": "auto"}, UsageError, "address is for engine='ray' only"),
        ({"engine": "ray", "devices": "0,1"}, LatentError, "Ray chooses the GPUs itself|is not available"),
    ],
)
def test_devices_and_engines_that_cannot_be_had(
    source: Path, tmp_path: Path, options: dict, error: type[LatentError], text: str
) -> None:
    if options.get("engine") == "ray":
        pytest.importorskip("ray")
    with pytest.raises(error, match=text) as caught:
        encode(source, tmp_path / "out", **options)
    assert caught.value.hint or "must be" in caught.value.message
    with pytest.raises(UsageError, match="workers_per_device must be a whole number from 1 to 64, got 0"):
        encode(source, tmp_path / "out", workers_per_device=0)
    assert not (tmp_path / "out").exists()


def test_numbers_of_devices_may_be_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from latentprep.encoding.crew import crew_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for devices in ("0,2", [0, 2]):
        crew = crew_of("local", devices, "auto", None, 2)
        assert (crew.name, crew.workers, crew.device) == ("processes", 4, torch.device("cuda:0"))
    alone = crew_of("local", [1], "auto", None, 1)
    assert (alone.name, alone.device) == ("local", torch.device("cuda:1"))


def test_a_codec_that_workers_cannot_build(source: Path, tmp_path: Path) -> None:
    from latentprep_grey import GreyCodec  # type: ignore[import-not-found]

    class Own(GreyCodec):
        pass

    with pytest.raises(CodecError, match="by that name they find GreyCodec") as caught:
        encode(source, tmp_path / "out", Own(), devices="cpu:2")
    assert "entry point" in caught.value.hint
    Own.name = "own"
    with pytest.raises(CodecError, match="cannot build codec 'own': no installed package has it"):
        encode(source, tmp_path / "out", Own(), devices="cpu:2")
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_installed_or_not_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is not None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(SystemFault, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
            encode(source, tmp_path / "out", engine="ray", address=f"127.0.0.1:{port}")
        assert time.monotonic() - start < 20  # Ray itself tries for minutes
        with pytest.raises(UsageError, match=r"address must be auto or HOST:PORT, got 'head:port'"):
            encode(source, tmp_path / "out", engine="ray", address="head:port")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemFault, match="engine='ray' needs the ray package") as caught:
        encode(source, tmp_path / "out", engine="ray")
    assert caught.value.hint == "pip install 'latentprep[ray]'"
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cluster(installed: None) -> Iterator[Any]:
    """A Ray cluster of two nodes, one core each, on this machine."""
    pytest.importorskip("ray", reason="ray is not installed")
    with clusters.cluster((1, 1)) as nodes:
        yield nodes


def test_a_ray_cluster_makes_the_bytes_of_one_process(
    source: Path, whole: dict[str, str], tmp_path: Path, cluster: Any
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    made = encode(source, tmp_path / "out", engine="ray", address=cluster.address)
    assert digest(tmp_path / "out") == whole
    assert (made.engine, made.workers) == ("ray", 2)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_workers_of_ray_name_their_node(
    source: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentprep_grey import Local

    ray = {"engine": "ray", "address": cluster.address, "devices": "cpu:1"}
    opened = open_source(source)
    opened._load = Local()
    here = r"^node [\d.]+ \(.*\): "
    with pytest.raises(SourceError, match=here + "cannot read train/class_0/000.jpg of .*: no such file"):
        encode(opened, tmp_path / "out", **ray)
    monkeypatch.setenv("GREY_WEIGHTS", "others")
    with pytest.raises(CodecError, match=here + "the weights .* are not the ones"):
        encode(source, tmp_path / "weighed", "weighed", **ray)
    assert not committed(tmp_path / "out")


class Facts(Told):
    """The facts that were told last."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, str] = {}

    def advance(self, n: int, **facts: str) -> None:
        self.latest = facts


def test_a_ray_node_that_is_lost_costs_its_shards_only(
    source: Path, tmp_path: Path, cluster: Any, capfd: pytest.CaptureFixture
) -> None:
    gate = tmp_path / "gate"
    codec = f"slow:delay=0,gate={gate}"
    gate.touch()
    encode(source, tmp_path / "whole", codec)
    gate.unlink()
    lost, facts, out = cluster.add_node(num_cpus=1), Facts(), tmp_path / "out"

    def lose() -> None:
        try:
            until(lambda: facts.latest.get("shards_in_flight") == "3")
            cluster.remove_node(lost, allow_graceful=False)
            until(lambda: facts.latest["workers"] == "2 of 3")
        finally:  # or the encode would wait for it forever
            gate.touch()

    with ThreadPoolExecutor(1) as pool:
        losing = pool.submit(lose)
        made = encode(source, out, codec, engine="ray", address=cluster.address, progress=facts)
        losing.result()
    assert made.workers == 3
    assert digest(out) == digest(tmp_path / "whole")
    assert capfd.readouterr().out == ""  # where results go


def test_a_record_says_which_device_made_a_shard_and_info_counts_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(source, tmp_path / "out")
    assert latentprep.info(tmp_path / "out").devices == {}
    assert "device" not in json.loads((tmp_path / "out" / "records" / "train-000000.json").read_text())
    (tmp_path / "out" / "records" / "train-000000.json").unlink()
    monkeypatch.setattr("latentprep.encoding.pipeline.device_name", lambda device: "cuda: NVIDIA H100")
    encode(source, tmp_path / "out")
    assert latentprep.info(tmp_path / "out").devices == {"cpu": 8, "cuda: NVIDIA H100": 1}
    shown = command("latentprep", "info", tmp_path / "out").stdout
    assert "cpu (8 shards), cuda: NVIDIA H100 (1 shard)" in shown
    assert latentprep.verify(tmp_path / "out", deep=True).ok
    latentprep.convert(tmp_path / "out", store="wds", out=tmp_path / "tars")
    assert latentprep.info(tmp_path / "tars").devices == {"cpu": 8, "cuda: NVIDIA H100": 1}
