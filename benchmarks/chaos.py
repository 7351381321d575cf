"""All that may go wrong during an encode, many times over: nothing committed is lost, nothing half-written is read.

After each fault `latentprep verify --deep` must find every committed shard whole, no shard that was there before may be
gone, and a run that goes on must end in the bytes of an unbroken one. Counts are printed and kept.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import latentprep
from common import assets, record
from latentprep.encoding import driver, pipeline
from latentprep.errors import DatasetError, SystemFault
from latentprep.format import EncodedShard, ShardRecord
from latentprep.sources.source import Source, open_source

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import clusters
from faults import Disk, committed, digest, full_after, read_only

OPTIONS = {"codec": "dct", "size": 64, "shard_rows": 16}


def images(folder: Path, count: int) -> Path:
    """A folder of `count` real images a split (drawn ones where there are none), which a fault may take away."""
    data = assets()
    source = open_source("imagenette", data=data / "imagenette2-224.tar") if data else open_source("shapes")
    source = source.take(count)
    for split in source.splits:
        for i in range(source.size(split)):
            sample = source.read(split, i)
            path = folder / split / source.classes[sample.label].replace(" ", "_") / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample.data)
    return folder


def encode(source: Path | Source, out: Path, **options: object) -> None:
    latentprep.encode(source, out=out, **{**OPTIONS, **options})


class Chaos:
    """source: the images; whole: an unbroken encode of them, and what is in it; scratch: a folder for all else."""

    def __init__(self, scratch: Path, count: int, seed: int) -> None:
        self.scratch, self.draw = scratch, random.Random(seed)
        self.source = images(scratch / "images", count)
        start = time.monotonic()
        encode(self.source, scratch / "whole")
        self.seconds = time.monotonic() - start
        self.whole = digest(scratch / "whole")
        self.shards = committed(scratch / "whole")

    def finish(self, out: Path) -> None:
        """Go on with what a fault has left, compare, and clear away."""
        encode(self.source, out)
        assert digest(out) == self.whole, f"{out} is not what an unbroken run makes"
        shutil.rmtree(out)

    def kills(self, wanted: int) -> dict:
        """SIGKILL a process that encodes, at a random moment."""
        out, before, left, finished = self.scratch / "killed", set(), [], 0
        while len(left) < wanted:
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    encode(self.source, out)
                    os._exit(0)
                os._exit(1)
            time.sleep(self.draw.uniform(0, self.seconds))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            now = committed(out)
            assert before <= now, "a committed shard was lost"
            before = now
            if os.WIFSIGNALED(status):
                left.append(len(now))
            else:
                assert os.WEXITSTATUS(status) == 0
                assert digest(out) == self.whole
                finished += 1
            if not os.WIFSIGNALED(status) or self.draw.random() < 0.1:
                if now:
                    self.finish(out)
                before = set()
        if out.exists():
            self.finish(out)
        assert any(left), "no encode got as far as a shard"
        return {"kills": len(left), "runs_finished_between": finished, "shards_at_each_kill": left}

    def power_cuts(self, moments: int, resumed: int) -> dict:
        """At random moments, several things that a disk could have kept; some of them are gone on with."""
        root = self.scratch / "disk"
        root.mkdir()
        real, done, states, kept, events = driver.commit_shard, set(), 0, [], 900

        def commit_shard(root: Path, shard: EncodedShard) -> ShardRecord:
            record = real(root, shard)
            done.add((record.split, record.index))
            return record

        def at(event: str) -> None:
            nonlocal states
            if self.draw.random() > moments / events:
                return
            for lost in (1.0, 0.0, 0.5, 0.5):
                states += 1
                left = self.scratch / f"cut{states}"
                disk.cut(left, lost, self.draw)
                assert done <= committed(left / "out"), f"a committed shard was lost at {event}"
                if self.draw.random() < resumed / moments / 4 and committed(left / "out"):
                    kept.append(left / "out")
                else:
                    shutil.rmtree(left)

        disk = Disk(root, self.scratch / "attic", at)
        driver.commit_shard = commit_shard
        try:
            with disk.watching():
                encode(self.source, root / "out")
        finally:
            driver.commit_shard = real
        assert digest(root / "out") == self.whole
        for out in kept:
            self.finish(out)
        return {"disk_events": disk.events, "states_left_by_a_cut": states, "gone_on_with": len(kept)}

    def full_disks(self, times: int) -> dict:
        """A disk that is full after a random number of bytes, in the middle of a file; real ones where we may mount."""
        size, real = sum((self.scratch / "whole" / path).stat().st_size for path in self.whole), 0
        for number in range(times):
            out = self.scratch / f"full{number}"
            try:
                with full_after(self.draw.randrange(size)):
                    encode(self.source, out)
                raise AssertionError("the disk was not full")
            except SystemFault as error:
                assert "no space left" in error.message
            committed(out)
            assert not list(out.rglob("*.tmp"))
            self.finish(out)
            with self.mounted(self.draw.randrange(8, size // 1024)) as place:
                if place is None:
                    continue
                real += 1
                try:
                    encode(self.source, place / "out")
                    raise AssertionError("the disk was not full")
                except SystemFault as error:
                    assert "no space left" in error.message
                before = committed(place / "out")
                subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
                assert committed(place / "out") == before
                self.finish(place / "out")
        return {"simulated": times, "real_tmpfs": real}

    @contextlib.contextmanager
    def mounted(self, kib: int) -> Iterator[Path | None]:
        """A tmpfs of that size, None where this user may not mount one."""
        place = self.scratch / "tmpfs"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            yield None
            return
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def read_only_targets(self) -> dict:
        """A disk that nothing can be written to, from the start and for a run that goes on."""
        out, refused, real = self.scratch / "ro", 0, 0
        for _ in range(2):
            try:
                with read_only():
                    encode(self.source, out)
            except SystemFault as error:
                refused += "read-only" in error.message
            encode(self.source, out)
            (out / "records" / "val-000000.json").unlink()
        self.finish(out)
        with self.mounted(100_000) as place:
            if place is not None:
                encode(self.source, place / "out")
                (place / "out" / "records" / "val-000000.json").unlink()
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                try:
                    encode(self.source, place / "out")
                except SystemFault as error:
                    real += "read-only" in error.message
                committed(place / "out")
        assert refused == 2
        return {"simulated": refused, "real_tmpfs": real}

    def sources(self, times: int) -> dict:
        """Images that vanish, are cut short, or are swapped for others while they are encoded; then they come back."""
        files = sorted(self.source.rglob("*.jpg"))
        lost = swapped = 0
        for number in range(times):
            out = self.scratch / f"source{number}"
            victims = {path: path.read_bytes() for path in self.draw.sample(files, 5)}
            times_of = {path: path.stat().st_mtime_ns for path in victims}
            how = self.draw.choice(("vanish", "cut", "swap"))
            source, left = open_source(self.source), [self.draw.randrange(len(files) // 2, len(files))]
            real = source.read

            def read(split: str, i: int, how=how, victims=victims, left=left, real=real):  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] == 0:
                    for path, data in victims.items():
                        if how == "vanish":
                            path.unlink()
                        else:
                            path.write_bytes(data[: len(data) // 2] if how == "cut" else files[0].read_bytes())
                return real(split, i)

            source.read = read  # type: ignore[method-assign]
            encode(source, out, max_error_fraction=1.0)
            lost += sum(len(r.invalid) for s in source.splits for r in latentprep.open(out).records(s))
            for path, data in victims.items():
                path.write_bytes(data)
                os.utime(path, ns=(times_of[path], times_of[path]))  # else they count as replaced
            good = open_source(self.source)
            if how == "swap":  # the same name, another image: only comparing pixels can tell
                found = latentprep.verify(out, source=good, samples=len(files), repair=True)
                swapped += len(found.repaired)
                assert found.ok
            self.finish(out)
        return {"runs": times, "rows_lost_and_made_again": lost, "shards_with_swapped_images_found": swapped}

    def workers(self, times: int) -> dict:
        """A reader's or the writer's thread that fails with an error nobody expects."""
        for number in range(times):
            out = self.scratch / f"worker{number}"
            module, name = self.draw.choice(((pipeline, "load_views"), (driver, "commit_shard")))
            real = getattr(module, name)
            most = len(list(self.source.rglob("*.jpg"))) if name == "load_views" else len(self.shards)
            left = [self.draw.randrange(1, most)]

            def die(*args: object, left=left, real=real, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] == 0:
                    raise MemoryError("worker")
                return real(*args, **kwargs)

            setattr(module, name, die)
            try:
                encode(self.source, out)
                raise AssertionError("the worker lived")
            except MemoryError:
                pass
            finally:
                setattr(module, name, real)
            committed(out)
            self.finish(out)
        return {"runs": times}

    def some_committed(self, out: Path, busy: Callable[[], bool]) -> None:
        """Wait until a random number of shards more is committed, and then a little, or until nobody is busy."""

        def count() -> int:
            return len(list(out.glob("records/*.json")))

        wanted = self.draw.randrange(count(), len(self.shards))
        while count() < wanted and busy():
            time.sleep(0.002)
        time.sleep(self.draw.uniform(0, 0.05))

    def worker_processes(self, times: int) -> dict:
        """SIGKILL one of two worker processes: the run goes on, and ends in the same bytes."""
        died = 0
        for number in range(times):
            out = self.scratch / f"process{number}"
            with ThreadPoolExecutor(1) as pool:
                run = pool.submit(encode, self.source, out, devices="cpu:2")
                self.some_committed(out, lambda run=run: not run.done())
                victims = multiprocessing.active_children()
                if victims:
                    self.draw.choice(victims).kill()
                    died += 1
                run.result()
            assert digest(out) == self.whole
            shutil.rmtree(out)
        return {"runs": times, "killed": died}

    def drivers(self, times: int) -> dict:
        """SIGKILL the command, and run it again until it ends: its workers are gone, no committed shard is."""
        out, ended, left = self.scratch / "driver", 0, []
        words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        command = [sys.executable, "-m", "latentprep", "encode", str(self.source), *words]
        before: set = set()
        while len(left) < times:
            driver = subprocess.Popen(
                [*command, f"--out={out}", "--devices=cpu:2"], start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.some_committed(out, lambda driver=driver: driver.poll() is None)
            driver.kill()
            code, end = driver.wait(), time.monotonic() + 10
            assert code in (0, -signal.SIGKILL), f"the command failed with {code}"
            while clusters.alive(driver.pid):
                assert time.monotonic() < end, "a worker outlived its driver"
                time.sleep(0.02)
            now = committed(out)
            assert before <= now, "a committed shard was lost"
            before = now
            if code == 0:
                assert digest(out) == self.whole
                shutil.rmtree(out)
                before, ended = set(), ended + 1
                continue
            left.append(len(now))
            if now == self.shards:
                self.finish(out)
                before = set()
        if out.exists():
            self.finish(out)
        return {"kills": len(left), "runs_finished_between": ended, "shards_at_each_kill": left}

    def ray_nodes(self, times: int) -> dict:
        """Take one of three nodes from a Ray cluster; another comes for the next run."""
        with clusters.cluster() as nodes:
            for number in range(times):
                out = self.scratch / f"node{number}"
                with ThreadPoolExecutor(1) as pool:
                    run = pool.submit(encode, self.source, out, engine="ray", address=nodes.address)
                    self.some_committed(out, lambda run=run: not run.done())
                    nodes.remove_node(self.draw.choice(sorted(nodes.worker_nodes, key=str)), allow_graceful=False)
                    run.result()
                assert digest(out) == self.whole
                shutil.rmtree(out)
                nodes.add_node(num_cpus=1)
        return {"runs": times}

    def two_at_once(self, times: int) -> dict:
        """While one process writes, another is refused; when it is killed, the folder is free at once."""
        refused = 0
        for number in range(times):
            out = self.scratch / f"two{number}"
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    encode(self.source, out)
                os._exit(1)
            while not (out / "records").exists():
                time.sleep(0.001)
            os.kill(child, signal.SIGSTOP)
            try:
                encode(self.source, out)
            except DatasetError as error:
                refused += "is being written by another" in error.message
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.finish(out)
        assert refused == times
        return {"refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=200, help="a split")
    parser.add_argument("--workers", type=int, default=20, help="deaths of workers, of Ray nodes, and of drivers")
    options = parser.parse_args()
    if options.images < 100:
        parser.error("--images must be 100 or more: fewer make too few shards for some of the faults")
    torch.set_num_threads(1)  # the child of a fork would wait for ever for OpenMP's threads, which it has not
    with tempfile.TemporaryDirectory() as scratch, clusters.plugin():
        chaos = Chaos(Path(scratch), options.images, options.seed)
        result: dict = {"images": 2 * options.images, "files": len(chaos.whole), "seconds_unbroken": chaos.seconds}
        for name, fault in {
            "sigkill": lambda: chaos.kills(options.kills),
            "power_cut": lambda: chaos.power_cuts(options.kills, 10),
            "disk_full": lambda: chaos.full_disks(5),
            "read_only": chaos.read_only_targets,
            "source_changes": lambda: chaos.sources(6),
            "worker_dies": lambda: chaos.workers(6),
            "two_at_once": lambda: chaos.two_at_once(5),
            "worker_process_killed": lambda: chaos.worker_processes(options.workers),
            "driver_of_workers_killed": lambda: chaos.drivers(options.workers),
            "ray_node_killed": lambda: chaos.ray_nodes(options.workers),
        }.items():
            start = time.monotonic()
            result[name] = {**fault(), "seconds": round(time.monotonic() - start, 1)}
            print(name, result[name], file=sys.stderr, flush=True)
        record("chaos", {**result, "lost": 0, "every_run_byte_identical": True})


if __name__ == "__main__":
    main()
