"""A Ray cluster on this machine, the codecs of the plug-in for all that run here, and whether processes are left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"


@contextmanager
def plugin() -> Iterator[None]:
    """This process finds the plug-in's codecs, and those that it starts do, too."""
    path = os.pathsep.join([str(ROOT), str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path), mock.patch.object(sys, "path", [str(PLUGIN), *sys.path]):
        yield


@contextmanager
def cluster(cores: tuple[int, ...] = (1, 1, 1)) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with so many cores on each node. Call it inside `plugin`."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], "include_dashboard": False})
    try:
        for count in cores[1:]:
            nodes.add_node(num_cpus=count)
        yield nodes
    finally:
        nodes.shutdown()


def alive(group: int) -> bool:
    """Whether a process of a group runs, on Linux. Not a dead one that nobody has waited for, as in some containers."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX" and int(its_group) == group:
                return True
    return False
