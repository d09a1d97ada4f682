"""Processes of their own: quick to start, meeting each other, killing themselves before the disk changes."""

import multiprocessing
import os
import signal
import socket

# What children import, with pytest, their parent's main module, and torch._dynamo, which making an optimizer
# imports. All tests of a process share one such server: whoever comes first has it import for all.
IMPORTED = [
    *("pytest", "accelerate", "torch._dynamo", "peft", "filelock", "pyarrow.parquet", "rich.progress"),
    *("ldm.cli", "ldm.bulk.run", "ldm.finetune.finetune", "ldm.pretrain.recipe", "ldm.train.loop"),
]


def forked() -> multiprocessing.context.BaseContext:
    """Processes that start in milliseconds, from one that has everything imported."""
    if os.name == "nt":  # it has no other way
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def two_processes(call, seconds=60) -> list[int]:
    """Run both of `call(rank, port)`, a (function, args, kwargs), to meet over gloo; their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    calls = [call(rank, port) for rank in (0, 1)]
    processes = [forked().Process(target=f, args=args, kwargs=kw) for f, args, kw in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def kill_before(call, places):
    """SIGKILL this process before its `call`th call of any of `places`, each an owner and a name."""
    calls = 0

    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in places:
        setattr(owner, name, counted(getattr(owner, name)))
