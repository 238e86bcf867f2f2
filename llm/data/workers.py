"""Processes of one machine that write shards, for `prepare`."""

import concurrent.futures
import multiprocessing
from collections.abc import Iterator, Sequence

from llm.data.shard_writer import (
    ShardTask,
    init_worker,
    read_marker,
    write_in_worker,
    write_tokenized_shard,
)
from llm.data.tokenizers import Tokenizer


class WorkerDiedError(RuntimeError):
    """A worker process was killed from outside."""


class Workers:
    """Does tasks in this process, or in others that start when the first task needs them."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int):
        self._tokenizer, self._num_workers = tokenizer, num_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._workers_end, self._own_end = multiprocessing.Pipe(duplex=False)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, exc_type, *details: object) -> None:
        if exc_type is not None:
            self._own_end.close()  # workers leave at once, in the middle of their shards
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._own_end.close()
        self._workers_end.close()

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, dict]]:
        """Yield each task with its marker once its shard is on disk, finished ones first."""
        pending = []
        for task in tasks:
            marker = read_marker(task)
            if marker is None:
                pending.append(task)
            else:
                yield task, marker
        if not self._num_workers:
            for task in pending:
                yield task, write_tokenized_shard(task, self._tokenizer)
            return
        if pending and self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._num_workers,
                # Spawned, not forked: JAX and the tokenizer have threads by now.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=init_worker,
                initargs=(self._tokenizer, self._workers_end),
            )
        futures = {self._pool.submit(write_in_worker, task): task for task in pending}
        for future in concurrent.futures.as_completed(futures):
            try:
                marker = future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise WorkerDiedError(
                    f"a process that tokenised {futures[future].name!r} died, perhaps for want of "
                    "memory; start again with fewer data.num_workers: finished shards are kept"
                ) from error
            yield futures[future], marker
