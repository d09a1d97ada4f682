"""Processes that kill themselves before a change of the disk."""

import os
import signal


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
