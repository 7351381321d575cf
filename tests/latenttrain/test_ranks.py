"""Several ranks train as one process does: the same bits, each sample once an epoch, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from told import Told

import latentprep
import latenttrain
from latentprep.device import parse_devices
from latentprep.errors import CheckpointError, DatasetError, LatentError, LatentWarning, SystemFault, UsageError
from latenttrain import evaluation
from latenttrain.checkpoint import load_tensors
from latenttrain.data import Split, load_trained, trained_samples
from latenttrain.evaluation import scores
from latenttrain.launch import ERROR, Reported, _relayed, read_error, write_error
from latenttrain.nets import NetConfig, build_net
from latenttrain.ranks import ALONE, LostRanks, Ranks, this_rank

ROOT = Path(__file__).parents[2]
SAMPLES = 203  # of `odd` to train on
SETTINGS = {"width": 0.25, "depth": 0.5, "epochs": 4, "batch_size": 128}  # of 102 and 101 samples: four micro-batches
OPTIONS = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]

# A rank that notes the rows it learns from, and, of the first that are started, one that dies or fails in place of it
NOTING = """
import os, pathlib, signal, sys, threading
from latentprep.errors import DatasetError
from latenttrain import cli, data, train, worker

rank, first = os.environ["RANK"], data.Split.codes_of
file, kind, who, left = os.open(sys.argv.pop(1), os.O_APPEND | os.O_CREAT | os.O_WRONLY), *sys.argv.pop(1).split(",")
left, now, lock = int(left), 0, threading.Lock()

def codes_of(split, rows):
    global left
    with lock:
        left -= 1
        if rank == who and left < 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DatasetError("shard 7 is damaged", "restore it")
        os.write(file, f"[{now}, {rows.tolist()}]\\n".encode())
    return first(split, rows)

def train_epoch(state, config, split, epoch, *rest, old=train.train_epoch):
    global now
    now = epoch
    return old(state, config, split, epoch, *rest)

data.Split.codes_of, train.train_epoch = codes_of, train_epoch
if sys.argv[1] == "-m":
    sys.exit(worker.main(pathlib.Path(sys.argv[3])))
cli.main()
"""


@pytest.fixture(scope="module")
def alone(odd, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    latenttrain.fit(odd, **SETTINGS, device="cpu", out=out)
    return out


@pytest.fixture
def torchrun(odd, tmp_path):
    """``torchrun(ranks, "die,1,20", *options)`` -> exit code, stderr, and the file of what was noted."""
    (tmp_path / "noting.py").write_text(NOTING)

    def run(ranks, what, *options):
        noted = tmp_path / f"noted-{ranks}"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
             tmp_path / "noting.py", noted, what, "fit", odd, *OPTIONS, *options],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr, noted

    return run


def bits_of(run):
    """Weights, state and metrics, but for how long each epoch took."""
    tensors = load_tensors(run / "last.safetensors")[0]
    metrics = [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").open()]
    return metrics, (run / "best.safetensors").read_bytes(), {n: t.numpy().tobytes() for n, t in tensors.items()}


def epochs_of(noted):
    """{epoch: how often each row came}"""
    epochs = defaultdict(Counter)
    for line in noted.read_text().splitlines():
        epoch, rows = json.loads(line)
        epochs[epoch].update(rows)
    return epochs


@given(st.integers(0, 100), st.integers(1, 40))
def test_shares_are_consecutive_whole_and_nearly_equal(pieces, world):
    shares = [Ranks(rank, world).share(pieces) for rank in range(world)]
    assert [piece for share in shares for piece in share] == list(range(pieces))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("pieces", "world"), [(7, 3), (2, 3), (0, 2), (4, 1)])
def test_what_all_found_is_in_order(monkeypatch, pieces, world):
    whole = torch.arange(2.0 * pieces).view(pieces, 2)
    shares = Ranks(0, world).shares(pieces)
    most = -(-pieces // world)
    padded = torch.zeros(world, most, 2)
    for share, row in zip(shares, padded, strict=True):
        row[: len(share)] = whole[share.start : share.stop]
    for rank, share in enumerate(shares):
        monkeypatch.setattr(Ranks, "gathered", lambda _, mine, rank=rank: [mine == padded[rank], padded][1])
        assert torch.equal(Ranks(rank, world).every(whole[share.start : share.stop], pieces), whole)


def test_evaluation_counts_the_same_on_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(evaluation, "_CELLS", 64 * 7)  # batches of 7
    net = build_net(NetConfig((3, 8, 8), 4, bits=2, lo=(-2.0,) * 3, step=(1.0,) * 3, width=0.25))
    split = Split(torch.randint(0, 4, (40, 1, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 4)
    whole = evaluation.split_counts(net, split, None)
    assert whole.shape == (6, 3)
    assert evaluation.read_scores(whole, 40) == pytest.approx(scores(evaluation.split_logits(net, split), split.labels))
    monkeypatch.setattr(Ranks, "every", lambda _, mine, pieces: mine)
    for world in (2, 3, 8):
        shares = [evaluation.split_counts(net, split, None, Ranks(rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat(shares), whole)


def test_ranks_that_die_go_on_with_another_number_of_ranks(torchrun, alone, tmp_path):
    """Each sample is seen once an epoch, and the bits are those of one process."""
    out, step = tmp_path / "run", 5  # in the third epoch: rank 1 of 3 has two micro-batches an epoch
    code, _, error, noted = torchrun(3, f"die,1,{step}", "--out", out)
    assert code == 1
    assert "SIGKILL" in error
    assert "Traceback" not in error.partition("torch/distributed")[0]
    last = out / "last.safetensors"
    ended = len(load_tensors(last)[1]["metrics"]) if last.exists() else 0
    assert ended <= step // 2
    code, printed, error, again = torchrun(2, "die,none,0", "--out", out, "--resume")
    assert code == 0, error
    assert printed.count("latenttrain fit") == 1
    assert bits_of(out) == bits_of(alone)
    before, after = epochs_of(noted), epochs_of(again)
    assert sorted(after) == list(range(ended, SETTINGS["epochs"]))
    for epoch in range(SETTINGS["epochs"]):
        assert (before if epoch < ended else after)[epoch] == dict.fromkeys(range(SAMPLES), 1), (step, epoch)


def test_a_mistake_is_said_once_and_what_one_rank_alone_meets_by_that_rank(torchrun, alone, tmp_path):
    code, printed, error, _ = torchrun(2, "die,none,0", "--out", alone)
    assert (code, printed) == (1, "")
    assert error.count("already holds a run") == 1
    code, printed, error, _ = torchrun(2, "fail,1,3", "--out", tmp_path / "run")
    assert (code, printed) == (1, "")
    assert error.count("error: rank 1: shard 7 is damaged\nhint:  restore it\n") == 1
    assert "error: shard 7" not in error


def ranks_of(parent):
    """Process numbers of the ranks that this process started."""
    children = (int(number) for task in Path(f"/proc/{parent}/task").iterdir() for number in children_of(task))
    return [number for number in children if b"latenttrain.worker" in Path(f"/proc/{number}/cmdline").read_bytes()]


def children_of(task):
    return (task / "children").read_text().split()


linux = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds processes in /proc")


def test_devices_are_ranks_and_one_that_dies_is_restarted(odd, alone, tmp_path, monkeypatch):
    (tmp_path / "noting.py").write_text(NOTING)
    program, told = tmp_path / "python", Told()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/noting.py {tmp_path}/noted die,1,5 "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = latenttrain.fit(odd, **SETTINGS, devices="cpu:2", out=tmp_path / "run", progress=told)
    assert list(temporary.iterdir()) == []
    assert bits_of(tmp_path / "run") == bits_of(alone)
    assert (result.ranks, result.device, result.epochs) == (2, "cpu", 4)
    assert result.run == str(tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    assert not (tmp_path / "run" / ".job").exists()
    assert [begun[:3] for begun in told.begun] == [("train", 8, "batches")] * 2
    done = told.begun[1][3] // 2  # 1, or none if rank 0 ended before the first was written
    assert f"a rank died; going on after epoch {done} (restart 1)" in told.notes
    assert sum(told.steps) >= 8
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_ranks_in_order(number, odd, alone, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "latenttrain", "fit", odd, *OPTIONS, "--devices", "cpu:2", "--out", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (out / "config.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    ranks = ranks_of(process.pid)
    process.send_signal(number)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    assert printed == ""
    assert "Traceback" not in error
    assert error.endswith(
        "error: interrupted; whole epochs are kept\nhint:  run it again with --resume to continue\n"
    )  # fmt: skip
    if number == signal.SIGTERM:
        latenttrain.fit(odd, **SETTINGS, devices="cpu:3", out=out, resume=True)
        assert bits_of(out) == bits_of(alone)


def test_an_error_of_a_rank_is_raised_here(make_dataset, tmp_path):
    dataset = make_dataset()
    codes = dataset / "train/codes/c/1/0/0/0/0"
    codes.write_bytes(codes.read_bytes()[:-1] + b"?")
    with pytest.raises(DatasetError, match="shard train 1: .* was altered"):
        latenttrain.fit(dataset, **SETTINGS, devices="cpu:2", stream=True, out=tmp_path / "run")


def test_ranks_that_die_again_and_again_are_given_up(odd, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho >> {tmp_path}/started\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(SystemFault, match=r"^ranks died 4 times, at last rank \d with signal 9; if memory"):
        latenttrain.fit(odd, **SETTINGS, devices="cpu:2", out=tmp_path / "run")
    assert len((tmp_path / "started").read_text()) >= 4


def test_what_rank_0_reports_arrives_whole_whatever_dies(tmp_path):
    path, told = tmp_path / "progress.jsonl", Told()
    with pytest.warns(LatentWarning, match="^something is odd$"), _relayed(path, told):
        first = Reported(path)
        with first("train", 8, "batches") as bar:
            bar.advance(1, epoch="1/4")
            first._file.write('["advan')
            first._file.flush()
        again = Reported(path)
        with again("train", 8, "batches", 2) as bar:
            bar.advance(3)
            bar.note("epoch 1")
        again.warn(UserWarning("something is odd"))
    assert told.begun == [("train", 8, "batches", 0), ("train", 8, "batches", 2)]
    assert (told.steps, told.notes) == ([1, 3], ["epoch 1"])


def test_errors_pass_between_processes(tmp_path):
    for error in (CheckpointError("a", "b"), UsageError("what \x01lr\x02 is")):
        write_error(tmp_path, error)
        write_error(tmp_path, DatasetError("later"))  # the first one counts
        found = read_error(tmp_path)
        assert (type(found), found.texts) == (type(error), error.texts)
        (tmp_path / ERROR).unlink()
    (tmp_path / ERROR).write_text('["system_fault", "no class", ""]')
    assert type(read_error(tmp_path)) is LatentError


def test_a_rank_names_itself_where_it_alone_failed(monkeypatch):
    monkeypatch.setattr("latenttrain.ranks._GRACE", 0)
    main, second = Ranks(0, 2), Ranks(1, 2)
    assert str(second.own(DatasetError("what", "way out"))) == "rank 1: what; way out"
    assert str(main.own(DatasetError("what", "way out"))) == "what; way out"
    assert str(second.own(second.known(DatasetError("what")))) == "what"
    assert second.known(UsageError("what")).said
    assert not main.known(UsageError("what")).said
    assert str(second.own(LostRanks("what"))) == "what"


def test_an_error_of_one_rank_is_one_of_all_and_said_by_rank_0(monkeypatch):
    def gather(errors, mine):
        errors[:] = [None, DatasetError("what", "way out"), UsageError("another")]

    monkeypatch.setattr("latenttrain.ranks._GRACE", 0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(3):
        with pytest.raises(DatasetError, match="^rank 1: what; way out$") as caught:
            Ranks(rank, 3).agreed(lambda: "fine here")
        assert caught.value.said == (rank > 0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda errors, mine: None)
    assert Ranks(1, 3).agreed(lambda: "fine") == "fine"

    def breaks(errors, mine):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_gather_object", breaks)
    with pytest.raises(LostRanks, match="the connection to another rank broke"):
        Ranks(1, 3).agreed(lambda: "fine")


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("gpu", "devices must be all, numbers such as 0,1, or cpu:N, got 'gpu'"),
        ("", "devices must be all, numbers such as 0,1, or cpu:N, got ''"),
        ("cpu:0", "devices must be all, numbers such as 0,1, or cpu:N, got 'cpu:0'"),
        ("0,0", "devices names device 0 twice, got '0,0'"),
        ("cpu:5", "5 ranks need batches of 5 micro-batches, but one of 101 samples has only 4: norm_batch is 32"),
    ],
)
def test_mistakes_are_found_before_anything_starts(odd, tmp_path, devices, words):
    with pytest.raises(UsageError, match=words):
        latenttrain.fit(odd, **SETTINGS, devices=devices, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_trained_on_is_counted_before_anything_is_read(odd):
    dataset = latentprep.open(odd)
    for limit, holdout in ((None, 0.0), (50, 0.0), (500, 0.0), (None, 0.25), (51, 0.5)):
        train, _ = load_trained(dataset, torch.device("cpu"), limit, holdout)
        assert trained_samples(dataset, limit, holdout) == len(train)
    unread = [SimpleNamespace(rows=5, invalid=("a",) * count) for count in (2, 5)]
    assert trained_samples(SimpleNamespace(records=lambda split: unread)) == 3
    with pytest.raises(DatasetError, match="holds no valid sample"):
        trained_samples(SimpleNamespace(records=lambda split: unread[1:], root="shards"))


def test_devices_that_are_not_here(monkeypatch, odd, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for devices in ("all", "0,1"):
        with pytest.raises(SystemFault, match=f"devices {devices} is not available: torch sees 0 CUDA devices"):
            parse_devices(devices)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_devices("all") == parse_devices("0,1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert parse_devices("1") == [torch.device("cuda:1")]
    with pytest.raises(UsageError, match="device and devices cannot be combined"):
        latenttrain.fit(odd, **SETTINGS, device="cpu", devices="cpu:2", out=tmp_path / "run")


def test_what_torchrun_says(monkeypatch, odd, tmp_path):
    assert this_rank() is ALONE
    said = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "TORCHELASTIC_RESTART_COUNT": 2, "TORCHELASTIC_RUN_ID": "job"}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    ranks = this_rank()
    assert ranks == Ranks(5, 8, 1, "job", 2)
    with pytest.raises(UsageError, match="devices starts ranks, but torchrun has started these"):
        latenttrain.fit(odd, **SETTINGS, devices="cpu:2", out=tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what it is called without a name
    assert this_rank().job.endswith(f"-{os.getppid()}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.device("auto") == ranks.device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="8 ranks cannot share device 'cuda:0'"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device("auto") == ranks.device("cuda") == torch.device("cuda:1")
