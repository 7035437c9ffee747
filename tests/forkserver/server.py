"""`server.py FOLDER NUMBER`: imports the libraries, then forks a process for each client.

FOLDER/server-NUMBER is its socket; FOLDER/PID, while the process runs that takes the place of client PID, holds that
process's number. The server ends when FOLDER does, or the process named in FOLDER/session; and all that it forked with
it. A client that is killed takes its process along.
"""

import atexit
import gc
import importlib.util
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path

# What a rank imports, by the names that bring the rest; mirage_dist.cli itself is for each process to run.
IMPORTED = (
    "mirage_dist.train.run",
    "mirage_dist.inputs",
    "mirage_dist.evals.runner",
    "deepspeed.ops",
    "deepspeed.module_inject.auto_ep_layer",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.clip.image_processing_pil_clip",
    "peft",
    "wandb",
)


class Server:
    """One thread, so that a fork copies all of it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.selector = folder, selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / f"server-{number}"))
        self.listener.listen(64)
        self.open: dict[int, tuple[socket.socket, int, Path]] = {}  # process -> its client, its pidfd, its record

    def serve(self) -> dict:
        """Returns in a forked process only: its request."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        while self._wanted():
            for key, _ in self.selector.select(1.0):
                if key.fileobj is self.listener:
                    if request := self._accept():
                        return request
                elif key.data in self.open:
                    client, pidfd, _ = self.open[key.data]
                    if key.fileobj == pidfd:
                        self._ended(key.data)
                    else:  # the client is gone, and says nothing otherwise
                        os.kill(key.data, signal.SIGKILL)
                        self.selector.unregister(client)
        for number in self.open:
            os.kill(number, signal.SIGKILL)
        os._exit(0)

    def _wanted(self) -> bool:
        try:
            os.kill(int((self.folder / "session").read_text()), 0)
        except (OSError, ValueError):
            return False
        return True

    def _accept(self) -> dict | None:
        """Fork; the request in the new process, None in the server."""
        client, _ = self.listener.accept()
        header, descriptors, _, _ = socket.recv_fds(client, 8, 3)
        body, size = b"", struct.unpack("!Q", header)[0] if len(header) == 8 else 0
        while len(body) < size and (more := client.recv(size - len(body))):
            body += more
        number = -1
        if size and len(body) == size:
            request = json.loads(body)
            if not (number := os.fork()):
                self._leave(client)
                for target, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, target)
                    os.close(descriptor)
                return request
            record = self.folder / str(request["client"])
            record.with_suffix(".new").write_text(str(number))
            record.with_suffix(".new").rename(record)
            pidfd = os.pidfd_open(number)
            self.open[number] = (client, pidfd, record)
            self.selector.register(client, selectors.EVENT_READ, number)
            self.selector.register(pidfd, selectors.EVENT_READ, number)
            with suppress(OSError):
                client.sendall(struct.pack("!i", number))
        else:  # it was killed meanwhile
            client.close()
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _ended(self, number: int) -> None:
        client, pidfd, record = self.open.pop(number)
        _, status = os.waitpid(number, 0)
        record.unlink(missing_ok=True)
        with suppress(OSError):
            client.sendall(struct.pack("!i", status))
        for descriptor in (client, pidfd):
            with suppress(KeyError):
                self.selector.unregister(descriptor)
        client.close()
        os.close(pidfd)

    def _leave(self, client: socket.socket) -> None:
        """Close in the forked process what belongs to the server."""
        self.selector.close()
        self.listener.close()
        client.close()
        for other, pidfd, _ in self.open.values():
            other.close()
            os.close(pidfd)


def become(request: dict, program: Path, paths: list[str]) -> None:
    """Run a request as Python runs its command line.

    program: what a process starts that wants its like. paths: `sys.path` without what a start adds.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    kind, *words = request["arguments"]
    main = types.ModuleType("__main__")
    if kind == "-m":
        first, module = request["folder"], words[0]
    elif kind == "-c":
        first, module = "", None
    else:
        first, module = str(Path(kind).absolute().parent), None
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*([] if os.environ.get("PYTHONSAFEPATH") else [first]), *given, *paths]
    sys.path_importer_cache.clear()
    sys.executable = str(program)
    if os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)
    if module:
        spec = importlib.util.find_spec(module)
        if spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(module := f"{module}.__main__")
        main.__spec__, main.__package__, main.__file__ = spec, spec.parent, spec.origin
        code, sys.argv = spec.loader.get_code(module), [spec.origin, *words[1:]]
    elif kind == "-c":
        code, sys.argv = compile(words[0], "<string>", "exec"), ["-c", *words[1:]]
    else:
        main.__file__ = kind
        code, sys.argv = compile(Path(kind).read_text(), kind, "exec"), [kind, *words]
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    server = Server(folder, int(sys.argv[2]))
    print("ready", flush=True)
    os.dup2(2, 1)
    added = {str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    from mirage_dist import ranks

    ranks.name_accelerator()
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):  # older releases of a library lack some; a rank imports what it needs
            importlib.import_module(name)
    assert "mirage_dist.cli" not in sys.modules
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    paths = [path for path in sys.path if path not in added]
    gc.freeze()  # a collection in a process would copy every page of the libraries
    request = server.serve()
    atexit.register(gc.unfreeze)  # or what is still there at the end is reported as leaked
    become(request, folder / "python", paths)
