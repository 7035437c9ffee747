"""`client.py FOLDER ARGUMENTS`: `python ARGUMENTS` in a process that a server forks; ends as that process ends.

Arguments that start nothing of this project, such as `-c 'import socket'`, are for the real interpreter.
"""

import json
import os
import signal
import socket
import struct
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def served(arguments):
    """Whether a command line runs this project."""
    if arguments[:1] == ["-m"]:
        return arguments[1] == "mirage_dist.cli"
    return arguments[0].endswith(".py") or (arguments[0] == "-c" and "mirage_dist" in arguments[1])


def main(folder, *arguments):
    if not served(arguments := list(arguments)):
        os.execv(sys.executable, [sys.executable, *arguments])
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{folder}/server-{rank % 2}")
    mask = os.umask(0)
    os.umask(mask)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "umask": mask}
    body = json.dumps({**request, "client": os.getpid()}).encode()
    socket.send_fds(server, [struct.pack("!Q", len(body))], [0, 1, 2])
    server.sendall(body)
    number = answer(server)
    for name in SIGNALS:
        signal.signal(name, lambda received, _: os.kill(number, received))
    status = os.waitstatus_to_exitcode(answer(server))
    if status >= 0:
        os._exit(status)
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)


def answer(server):
    """The process number first; then, when it has ended, its wait status."""
    data = b""
    while len(data) < 4:
        if not (more := server.recv(4 - len(data))):
            sys.exit("client.py: the server has ended")
        data += more
    return struct.unpack("!i", data)[0]


main(*sys.argv[1:])
