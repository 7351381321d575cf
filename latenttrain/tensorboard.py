"""A run's metrics for TensorBoard, an optional package."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from latentprep.errors import SystemFault, opt

FOLDER = "tensorboard"
MetricsLog = Callable[[list[dict]], None]


def open_log(root: Path) -> MetricsLog:
    """``log(metrics)`` after each epoch writes those not yet written to ``RUN/tensorboard``; the step is the epoch.

    What an earlier process logged there is replaced, so that a resumed run has every epoch once.
    Raises `SystemFault` if the package is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise SystemFault(
            f"{opt('tensorboard')} needs the tensorboard package", "pip install 'latentprep[tensorboard]'"
        ) from error
    writer: EventFileWriter | None = None
    written = 0

    def log(metrics: list[dict]) -> None:
        nonlocal writer, written
        if writer is None:
            for old in (root / FOLDER).glob("events.out.tfevents.*"):
                old.unlink()
            writer = EventFileWriter(str(root / FOLDER))
        for entry in metrics[written:]:
            values = [Summary.Value(tag=tag, simple_value=entry[tag]) for tag in entry if tag != "epoch"]
            writer.add_event(Event(wall_time=time.time(), step=entry["epoch"], summary=Summary(value=values)))
        written = len(metrics)
        writer.flush()

    return log
