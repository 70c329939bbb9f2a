"""Which threads a test started itself: models of other tests in the same process may still have theirs."""

import threading

# The threads themselves: an id may be used again once its thread is gone.
_before: set[threading.Thread] = set()


def note() -> None:
    """Take all threads of now for somebody else's."""
    _before.clear()
    _before.update(threading.enumerate())


def own_threads(prefix: str) -> list[threading.Thread]:
    """Threads with a name that begins so, started since `note`."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix) and thread not in _before]
