"""A cache that threads share. First floor."""

import functools
import threading
from collections.abc import Callable
from typing import Any


def locked_cache(maxsize: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its last results kept: threads that miss together compute it once.

    `functools.lru_cache` lets each of them compute it, which is dear where that reads a large file.
    """
    cached, lock = functools.lru_cache(maxsize)(function), threading.Lock()

    def call(*arguments: Any) -> Any:
        with lock:
            return cached(*arguments)

    return call
