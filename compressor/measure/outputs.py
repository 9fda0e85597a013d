"""Outputs on whole splits, where they were timed; long ones are shared out to more workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from compressor.measure.environment import cores
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.timed import Timed
from compressor.task import Array, Inputs

PART = 64
"""Examples that a worker is asked to predict at once: small, so that a slow model is not taken for
one that hangs."""

Another = Callable[[], AbstractContextManager[Worker]]

LONG = 5.0
"""Seconds of work for each worker that is started beside the first: loading takes it one."""


def predict(run: Timed, inputs: list[str], count: int, folder: Path, another: Another) -> Array:
    """The first output of ``run`` on all ``count`` examples of the ``.npy`` files ``inputs``, in
    whole batches but for the last.

    Where one worker would need long, the cores that it leaves idle get workers of their own:
    ``another`` starts one, which is told what ``run``'s was told. The outputs are the same.

    Raises :class:`WorkerFailed` where a worker fails, :class:`ValueError` for sizes that differ.
    """
    batch = run.target.batch
    with _crew(run, len(_starts(count, batch)), math.ceil(count / batch), another) as crew:
        return taken(crew, inputs, count, batch, folder)


def taken(crew: Sequence[Worker], inputs: list[str], count: int, batch: int, folder: Path) -> Array:
    """The same by workers that are all told the same; errors as :func:`predict`."""
    starts = _starts(count, batch)
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in crew:
        free.put(worker)

    def part(start: int) -> Array:
        worker, out = free.get(), folder / f"outputs-{start}.npy"
        try:
            worker.ask(
                "predict", inputs=inputs, start=start, stop=start + starts.step, out=str(out)
            )
            found: Array = np.load(out)
        finally:
            out.unlink(missing_ok=True)
            free.put(worker)
        return found

    if len(crew) == 1:
        return np.concatenate([part(start) for start in starts])
    pool = ThreadPoolExecutor(len(crew), thread_name_prefix="outputs")
    try:
        return np.concatenate(list(pool.map(part, starts)))
    finally:
        pool.shutdown(cancel_futures=True)


def _starts(count: int, batch: int) -> range:
    """Where the parts begin, each of whole batches."""
    return range(0, count, batch * -(-PART // batch))


@contextmanager
def _crew(run: Timed, parts: int, calls: int, another: Another) -> Iterator[list[Worker]]:
    """The worker of ``run``, and others beside it while the block lasts."""
    with ExitStack() as stack:
        crew = [run.worker]
        seconds = calls * float(np.median(run.medians)) / 1e9 if run.medians else 0.0
        idle = cores() // run.target.threads - 1 if run.target.provider == "cpu" else 0
        with suppress(WorkerFailed):  # there may be no memory for another
            for _ in range(min(idle, parts - 1, int(seconds / LONG))):
                crew.append(stack.enter_context(another()))
        yield crew


def stored(folder: Path, name: str, inputs: Inputs) -> list[str]:
    """The inputs as ``.npy`` files, which workers map."""
    paths = []
    for position, array in enumerate(inputs):
        path = folder / f"{name}-{position}.npy"
        np.save(path, array)
        paths.append(str(path))
    return paths
