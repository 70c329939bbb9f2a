"""Things that stand where a file is expected, and that a program must neither wait for nor follow."""

import os
import socket
from pathlib import Path

NOT_FILES = ["pipe", "socket", "folder", "device"]


def put_in_place(path: Path, kind: str) -> str:
    """Make such a thing; returns what errors call it. A device is a link to /dev/zero: making one takes root."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        # Its name may be longer than the system allows for a socket's address.
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)
    return {"pipe": "a pipe", "socket": "a socket", "folder": "a folder", "device": "a character device"}[kind]
