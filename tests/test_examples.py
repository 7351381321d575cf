"""The examples for clusters: their shell runs with a false `sbatch`, and what it asks of latentprep is done here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inprocess
import latentprep
from pictures import make_folder

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PARTS = 8
RECORDER = """#!/bin/sh
printf '%s\\n' "$@" END >> "$ASKED"
exit "${EXIT:-0}"
"""
SBATCH = """#!/bin/bash
# Runs the tasks of an array here, the last one first.
while true; do
    case $1 in
    --parsable) echo 123; shift ;;
    --dependency=afterok:123) shift ;;
    --wrap) exec bash -c "$2" ;;
    *) break ;;
    esac
done
array=$(sed -n 's/^#SBATCH --array=//p' "$1")
for task in $(seq "${array#*-}" -1 "${array%-*}"); do
    SLURM_ARRAY_TASK_ID=$task bash "$@" >&2 || exit
done
"""


class Cluster:
    """A shell in which `latentprep` only notes what it is asked, and `sbatch` runs at once. /data is in `folder`."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.images, self.asked = folder, images, folder / "asked"
        for name, text in (("latentprep", RECORDER), ("sbatch", SBATCH)):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)

    def here(self, text: str) -> str:
        """The text with folders that are here, and a codec that needs no weights."""
        text = re.sub(r"--codec sd-vae\s+--weights /data/sd-vae", "--codec dct --size 32 --shard-rows 2", text)
        text = text.replace("/data/images", str(self.images))
        return re.sub(r"/data|s3://my-bucket", str(self.folder), text)

    def run(self, script: str, **environment: object) -> int:
        """Run the script, then what it asked of latentprep."""
        env = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "ASKED": str(self.asked),
            **{name: str(value) for name, value in environment.items()},
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", self.here(script)], env=env, cwd=ROOT, capture_output=True, text=True)
        calls = self.asked.read_text().split("END\n")[:-1] if self.asked.exists() else []
        self.asked.unlink(missing_ok=True)
        for call in calls:
            made = inprocess.command("latentprep", *call.splitlines(), cwd=self.folder)
            assert made.returncode == 0, made.stderr
        return done.returncode

    def check(self, whole: Path) -> None:
        """All parts are there, and merged to the bytes of one encode."""
        assert len(list((self.folder / "parts").iterdir())) == PARTS
        assert files(self.folder / "shards") == files(whole)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    images = make_folder(root / "images")
    latentprep.encode(images, codec="dct", size=32, shard_rows=2, out=root / "whole")
    return root / "whole"


@pytest.fixture
def cluster(whole: Path, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, whole.parent / "images")


@pytest.fixture
def read() -> Callable[[str], Any]:
    yaml = pytest.importorskip("yaml")
    return lambda name: yaml.safe_load((EXAMPLES / name).read_text())


def merge_of(text: str) -> str:
    """The merge that a comment gives."""
    found = re.search(r"latentprep merge .* --out [\w/:-]+", text)
    assert found
    return found[0]


def test_the_slurm_array_of_the_page_makes_one_dataset(cluster: Cluster, whole: Path) -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    (block,) = (block for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) if "sbatch" in block)
    submit, after = block.splitlines()
    assert cluster.run(submit) == 0
    assert cluster.run(f"job=123; {after}") == 0
    cluster.check(whole)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 1), (143, 1)])
def test_a_slurm_task_fails_if_its_encode_does_but_not_for_unreadable_images(
    cluster: Cluster, code: int, expected: int
) -> None:
    script = f"examples/slurm.sh /data/images /data/parts --codec sd-vae --weights /data/sd-vae; test $? -eq {expected}"
    assert cluster.run(script, SLURM_ARRAY_TASK_ID=7, EXIT=code) == 0
    assert [path.name for path in (cluster.folder / "parts").iterdir()] == ["part-7"]


def test_the_pods_of_the_kubernetes_job_make_one_dataset(
    cluster: Cluster, whole: Path, read: Callable[[str], Any]
) -> None:
    job = read("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert job["spec"]["completions"] == PARTS
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    shell, option, script = container["command"]
    assert (shell, option) == ("sh", "-c")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for index in reversed(range(PARTS)):
        assert cluster.run(script, JOB_COMPLETION_INDEX=index) == 0
    assert cluster.run(merge_of((EXAMPLES / "kubernetes.yaml").read_text())) == 0
    cluster.check(whole)


def test_the_nodes_of_the_skypilot_task_make_one_dataset(
    cluster: Cluster, whole: Path, read: Callable[[str], Any]
) -> None:
    task = read("skypilot.yaml")
    for rank in reversed(range(task["num_nodes"])):
        assert cluster.run(task["run"], SKYPILOT_NODE_RANK=rank, SKYPILOT_NUM_NODES=task["num_nodes"]) == 0
    assert cluster.run(merge_of((EXAMPLES / "skypilot.yaml").read_text())) == 0
    cluster.check(whole)
    assert Path(ROOT / "constraints.txt").is_file()
    assert all(extra in (ROOT / "pyproject.toml").read_text() for extra in ("vae = [", "s3 = ["))  # that setup installs
