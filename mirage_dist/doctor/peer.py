"""A second process beside the checks of a file system: started by its path, it imports nothing of this project.

python -I -S peer.py read FILE STOP      reads FILE until STOP exists; prints what was seen: whole, torn, missing
python -I -S peer.py flock FOLDER        tries the lock that this process' parent holds: refused, taken, or an errno
python -I -S peer.py lockf FILE
"""

import errno
import fcntl
import os
import sys

SIZE = 4096  # bytes of a version of the file, all of them the same letter


def read(file: str, stop: str) -> str:
    counts = {"whole": 0, "torn": 0, "missing": 0}
    print("begun", flush=True)
    while not os.path.exists(stop):
        try:
            with open(file, "rb") as handle:
                content = handle.read()
            counts["whole" if len(content) == SIZE and len(set(content)) == 1 else "torn"] += 1
        except FileNotFoundError:
            counts["missing"] += 1
        except OSError as error:  # such as ESTALE of a network file system
            if error.errno != errno.ESTALE:
                raise
            counts["missing"] += 1
    return " ".join(f"{name}={count}" for name, count in counts.items())


def lock(kind: str, path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY if kind == "flock" else os.O_RDWR)
    take = fcntl.flock if kind == "flock" else fcntl.lockf
    try:
        take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        refused = error.errno in (errno.EAGAIN, errno.EACCES)
        return "refused" if refused else errno.errorcode.get(error.errno or 0, str(error.errno))
    return "taken"


if __name__ == "__main__":
    print(read(*sys.argv[2:]) if sys.argv[1] == "read" else lock(*sys.argv[1:]), flush=True)
