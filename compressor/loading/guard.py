"""Files that nobody vouches for are read in a child process that can do little, and not for long.

On Linux a server of ours, which has imported PyTorch once, forks a child for each file. The child
has the file's path, one descriptor for its result, an address space, a CPU time and a result of
limited size, and is killed when its time is up. It dies with the server, and the server with its
parent. The server has no network where the kernel lets it give that up; on x86-64 a filter of
system calls also denies each child sockets, programs, processes, signals to others and the opening
of any file for writing (:func:`holding` says what holds here). What a child keeps is reading: it
can open what the user can open.

What comes back is one safetensors file in memory. Its header has JSON that names the tensors; the
parent believes neither the JSON nor the child. Anything else than a sound result is one
:class:`InputError`. On other systems the child is a fresh process, with a limit of wall-clock time
alone.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from compressor.data import arrays
from compressor.errors import CompressorError, InputError, one_line
from compressor.loading import checkpoint, pt2, torchfile
from compressor.loading.checkpoint import Described
from compressor.task import Input, Kind

Said = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]

READERS = {
    "checkpoint": "compressor.loading.guard:_checkpoint",
    "npz": "compressor.loading.guard:_npz",
    "pickled": "compressor.loading.pickled:read",
    "pt2": "compressor.loading.guard:_pt2",
    "safetensors": "compressor.loading.guard:_safetensors",
}
"""What may read in a child: ``read(path) -> (plain JSON values, tensors by name)``."""

IMPORTS = {"compressor.loading.guard:_pt2": ("torch._dynamo",)}
"""Modules that a reader would import on its way and that a child cannot: they make folders."""

ENVIRONMENT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH",
               "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")  # fmt: skip
"""Variables that a child inherits; no token or password is among them."""

SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Only a process of one thread can be forked safely."""

BASE, FACTOR = 512 << 20, 4
"""Bytes that a child may take on top of the server's own: ``BASE``, and ``FACTOR`` for each byte of
the file. Reading a checkpoint takes two: what was read, and a copy of what is not contiguous."""

SECONDS, RATE = 30.0, 20e6
"""Time that a child has: some for any file, and more at the bytes a second of a slow disk."""

LARGEST_HEADER = 8 << 20
"""Bytes of names, shapes and descriptions: as Python's own objects they take some 20 times that."""

LONGEST = 600
"""Characters of a child's message that are passed on."""

FORKING = sys.platform == "linux"
ALIGNED = 64
OUT_OF_MEMORY, UNCONFINED = 81, 82
"""Exit codes: a child that has no memory left may be unable to say more."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.search("q|bits|complex32", str(dtype))
}
"""What tensors may be of: neither quantized, which has scales beside, nor experimental."""


def read(path: Path, weights: str | None = None) -> Described:
    """What :func:`compressor.loading.checkpoint.read` says of ``path``, read by a child.

    Raises :class:`InputError`, one line, for all that it refuses and that the guard stops.
    """
    said, state = guarded("checkpoint", path, weights=weights)
    try:
        kind, data, source = said["kind"], said["data"], said["source"]
        if kind not in (None, *get_args(Kind)) or not isinstance(data, str | None):
            raise ValueError("its kind or data")
        return Described(
            state,
            None if source is None else torchfile.source_of(said),
            _inputs(said),
            kind,
            data,
            dict(said["about"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unsound(path, error) from None


def read_pt2(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[Input, ...]]:
    """What :func:`compressor.loading.pt2.read` says of ``path``, read by a child; errors as
    :func:`read`."""
    said, state = guarded("pt2", path)
    try:
        return dict(said["model"]), state, _inputs(said)
    except (KeyError, TypeError, ValueError) as error:
        raise _unsound(path, error) from None


def _inputs(said: Mapping[str, Any]) -> tuple[Input, ...]:
    return tuple(
        checkpoint._input({**given, "shape": [1, *given["shape"]]}) for given in said["inputs"]
    )


def guarded(
    reader: str,
    path: Path,
    *,
    seconds: float | None = None,
    memory: int | None = None,
    **options: str | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What ``READERS[reader]`` reads from ``path``, with these ``options``: plain JSON values, and
    tensors by their names.

    ``seconds`` is the time that the child has, of wall clock and of CPU; ``memory`` are the bytes
    that it may take, and those of its result. Both grow with the file where they are ``None``.
    Tensors are dense, contiguous, on the CPU and bit for bit what was read; those that were one
    tensor under several names still are. Their memory is that of the result: nothing is copied.

    Raises :class:`InputError`, one line, for what the reader refuses, and for a child that takes
    more time or memory, crashes, or hands back anything unsound; :class:`CompressorError` where no
    child could be started.
    """
    full = Path(os.path.abspath(path))  # noqa: PTH100 - a link stays the name that the user gave
    size = full.stat().st_size if full.is_file() else 0
    seconds = SECONDS + size / RATE if seconds is None else seconds
    memory = BASE + FACTOR * size if memory is None else memory
    request = {
        "reader": READERS[reader],
        "path": str(full),
        "options": options,
        "seconds": seconds,
        "memory": memory,
    }
    with _Result() as result:
        ended = (_forked if FORKING else _spawned)(request, result)
        if reason := _stopped(ended, seconds, memory, size):
            raise InputError(_printable(f"{path} {reason}"))
        try:
            said, state = result.taken(8 + LARGEST_HEADER + memory)
        except Exception as error:  # whatever a header of bad intent can raise
            raise _unsound(path, error) from None
    if "error" in said:
        raise InputError(_printable(said["error"].replace(str(full), str(path))))
    return said["said"], state


def _stopped(ended: Mapping[str, Any], seconds: float, memory: int, size: int) -> str | None:
    """Why a child that ended so has no result; ``None`` where it should have one."""
    code, ending = ended["code"], _signal(-ended["code"])
    if ended["late"] or ending == "SIGXCPU":
        return (
            f"took longer than {seconds:g} s to read: it is damaged, or made to take for ever; "
            "save it again"
        )
    if code == OUT_OF_MEMORY:
        return (
            f"needs more than {memory / 1e6:,.0f} MB to read, for a file of {size / 1e6:,.1f} MB: "
            "it is damaged, or made to fill the memory; save it again"
        )
    if code == UNCONFINED:
        return (
            "was not read: this machine lets no limits be set on the process that reads it; use "
            "another"
        )
    how = f"crashed ({ending})" if code < 0 else f"ended with exit code {code}"
    return f"is damaged, or made to do this: its reader {how}; save it again" if code else None


def holding() -> dict[str, bool]:
    """Which limits hold for children on this machine: ``memory`` (address space and CPU time),
    ``network`` (none) and ``files`` (none written, no program started)."""
    if not FORKING:
        return {"memory": False, "network": False, "files": False}
    with _LOCK:
        kept = dict(_server().kept)
    return {"memory": True, **kept}


def close() -> None:
    """Ends the server, which takes 230 MB; the next :func:`guarded` starts another."""
    with _LOCK:
        server = _SERVERS.pop(os.getpid(), None)
        if server is not None:
            server.close()


def _unsound(path: Path, error: Exception) -> InputError:
    return InputError(
        _printable(
            f"{path}: its reader handed back what it cannot have read ({one_line(error, 100)}): "
            "do not use this file"
        )
    )


def _printable(text: str) -> str:
    """One line without control characters, nor those that turn the direction of writing."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


# What the parent does


class _Result:
    """Where a child writes: a file in memory, or one in a folder of its own."""

    def __enter__(self) -> _Result:
        self.folder = None
        if FORKING:
            self.descriptor = os.memfd_create("result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.path = f"/proc/self/fd/{self.descriptor}"
        else:
            self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self.path = str(Path(self.folder.name) / "result.safetensors")
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is None:
            os.close(self.descriptor)
        else:
            self.folder.cleanup()

    def taken(self, most: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The JSON and the tensors of the file, each checked against the other."""
        from safetensors import safe_open

        if self.folder is None:
            import fcntl

            # Nobody may change it any more: this fails where somebody still could.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        with Path(self.path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER or Path(self.path).stat().st_size > most:
            raise ValueError("more than it may")
        with safe_open(self.path, framework="pt") as file:
            said = json.loads(file.metadata()["compressor"])
            blobs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if "error" in said:
            return {"error": str(said["error"])}, {}
        if self.folder is not None:  # the file goes, and with it what it maps
            blobs = {key: blob.clone() for key, blob in blobs.items()}
        made: dict[tuple[str, str, tuple[int, ...]], torch.Tensor] = {}
        state = {}
        for name, key, dtype, shape in said["tensors"]:
            which = (key, dtype, tuple(shape))
            if which not in made:
                made[which] = _tensor(blobs[key], DTYPES[dtype], which[2])
            state[str(name)] = made[which]
        if len(state) != len(said["tensors"]) or type(said["said"]) is not dict:
            raise ValueError("names that stand twice, or no names")
        return {"said": said["said"]}, state


def _tensor(blob: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes ``blob`` as a tensor, which they have to fill up to the alignment."""
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError("a shape that is none")
    taken = math.prod(shape) * dtype.itemsize
    if blob.dtype is not torch.uint8 or blob.numel() != _round(taken):
        raise ValueError(f"{blob.numel()} bytes for {taken}")
    return blob[:taken].view(dtype).reshape(shape) if taken else torch.empty(shape, dtype=dtype)


def _round(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class _Server:
    """The parent's side of the process that forks: see :func:`_serve`."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                _python(f"_serve({theirs.fileno()})"),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then closes us
            )
        try:
            self.kept: dict[str, bool] = self.answer(120.0)
        except OSError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any], descriptor: int) -> dict[str, Any]:
        """How the child that served ``request`` ended; ``OSError`` where the server did."""
        socket.send_fds(self.socket, [json.dumps(request).encode()], [descriptor])
        return self.answer(request["seconds"] + 30.0)

    def answer(self, seconds: float) -> dict[str, Any]:
        self.socket.settimeout(seconds)
        said = self.socket.recv(1 << 16)
        if not said:
            raise ConnectionError("it ended")
        return dict(json.loads(said))

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_SERVERS: dict[int, _Server] = {}
"""By process id: a process that was forked from this one must not speak to its server."""

_LOCK = threading.Lock()


def _server() -> _Server:
    if os.getpid() not in _SERVERS:
        try:
            _SERVERS[os.getpid()] = _Server()
        except OSError as error:
            raise CompressorError(f"no process could be started: {one_line(error)}") from None
    return _SERVERS[os.getpid()]


def _forked(request: Mapping[str, Any], result: _Result) -> dict[str, Any]:
    with _LOCK:
        for _ in range(2):  # whoever ended the server, it was not this file's child
            server = _server()
            try:
                return server.ask(request, result.descriptor)
            except BaseException as error:
                # After Ctrl-C too: an answer left over would be taken for that to the next file.
                _SERVERS.pop(os.getpid()).close()
                if not isinstance(error, OSError):
                    raise
                os.ftruncate(result.descriptor, 0)
                reason = one_line(error)
    raise CompressorError(f"the process that reads files was ended twice ({reason}): try again")


def _spawned(request: Mapping[str, Any], result: _Result) -> dict[str, Any]:
    """The same where there is no server: a fresh process, with its time limited."""
    try:
        ended = subprocess.run(
            _python("_alone()"),
            input=json.dumps({**request, "result": result.path}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(result.path).parent,
            env=_environment(),
            timeout=request["seconds"],
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"code": 0, "late": True}
    return {"code": ended.returncode, "late": False}


def _python(call: str) -> list[str]:
    # -P: a json.py where the user stands must not stand in for Python's.
    return [sys.executable, "-P", "-c", f"from compressor.loading import guard; guard.{call}"]


def _environment() -> dict[str, str]:
    return {**{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}, **SINGLE}


atexit.register(close)


# What the server does


def _serve(descriptor: int) -> None:
    """Forks a limited child for each request on the socket, until that closes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = str(Path.cwd())  # children, which cannot write, would find none
    kept = {"network": _off_the_network(), "files": _filtering()}
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # imports what children will need
    gc.freeze()  # what children never change stays shared with them
    with socket.socket(fileno=descriptor) as parent:
        try:
            parent.send(json.dumps(kept).encode())
            while _served(parent):
                pass
        except ConnectionError:
            pass  # nobody is left to answer
    shutil.rmtree(Path.cwd(), ignore_errors=True)


def _served(parent: socket.socket) -> bool:
    """Whether there was a request, which then was answered."""
    said, passed, _, _ = socket.recv_fds(parent, 1 << 16, 1)
    if not said:
        return False
    request = json.loads(said)
    _found(request["reader"])  # its imports are done once, here
    for module in IMPORTS.get(request["reader"], ()):
        importlib.import_module(module)
    child = os.fork()
    if not child:
        _child(request, passed[0])
    os.close(passed[0])
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, parent.fileno()], [], [], request["seconds"])
    for kill in (os.kill, os.killpg):  # with what it may have started
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    parent.send(json.dumps({"code": code, "late": not ready}).encode())
    return True


def _found(name: str) -> Callable[[Path], Said]:
    module, _, function = name.partition(":")
    found: Callable[[Path], Said] = getattr(importlib.import_module(module), function)
    return found


# What a child does


def _child(request: Mapping[str, Any], descriptor: int) -> NoReturn:
    code = UNCONFINED
    try:
        _confine(request, descriptor)
        code = _reading(request, descriptor)
    finally:
        os._exit(code)


def _alone() -> None:
    """Serves the one request that stands on standard input, without limits of its own."""
    request = json.loads(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    with Path(request["result"]).open("wb") as file:
        code = _reading(request, file.fileno())
    sys.exit(code)


def _reading(request: Mapping[str, Any], descriptor: int) -> int:
    """Runs the reader and writes what it gives, or why it gives nothing; the exit code."""
    path = Path(request["path"])
    try:
        said, state = _found(request["reader"])(path, **request["options"])
        _write(descriptor, path, said, state)
    except BaseException as error:
        if _full(error):
            return OUT_OF_MEMORY
        text = str(error)
        if not isinstance(error, InputError):
            text = f"{path} cannot be read ({type(error).__name__}: {one_line(error, 160)})"
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        _put(descriptor, _header({"error": text[: 4 * LONGEST]}, []))
    return 0


def _full(error: BaseException | None) -> bool:
    """Whether an error, or one that it took the place of, was the want of memory."""
    while error is not None:
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in (errno.ENOMEM, errno.EFBIG):
            return True
        if re.search("allocate memory|bad_alloc|not enough memory", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write(
    descriptor: int, path: Path, said: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    keys: dict[tuple[Any, ...], str] = {}
    listed, blobs = [], []
    for name, tensor in state.items():
        _check(path, name, tensor)
        which = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(),
                 tensor.is_neg())  # fmt: skip
        if which not in keys:
            keys[which] = str(len(keys))
            blobs.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        listed.append((name, keys[which], dtype, tuple(tensor.shape)))
    sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in blobs]
    try:
        header = _header({"said": dict(said), "tensors": listed}, sizes)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} describes itself in values that are not plain ({one_line(error, 80)}): save "
            "it with numbers, texts, lists and dicts"
        ) from None
    if len(header) > LARGEST_HEADER:
        raise InputError(
            f"{path} describes itself in {len(header):,} bytes: {LARGEST_HEADER:,} are allowed"
        )
    _put(descriptor, header)
    for tensor, size in zip(blobs, sizes, strict=True):
        if size:
            dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
            _put(descriptor, dense.reshape(-1).view(torch.uint8).numpy())
            _put(descriptor, bytes(_round(size) - size))


def _check(path: Path, name: Any, tensor: Any) -> None:
    if type(name) is not str or not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{path} holds {name!r:.60}, a {type(tensor).__name__}: save tensors by their names"
        )
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_nested or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
        raise InputError(f"{path}: {name!r:.60} is {kind}: save dense tensors of numbers")


def _header(said: Mapping[str, Any], sizes: Sequence[int]) -> bytes:
    """The start of a safetensors file: ``said``, and a blob for each of ``sizes``, numbered."""
    ends = [0, *itertools.accumulate(map(_round, sizes))]
    entries = {
        str(at): {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for at, (start, end) in enumerate(itertools.pairwise(ends))
    }
    text = json.dumps({"__metadata__": {"compressor": json.dumps(said)}, **entries}).encode()
    text += b" " * (_round(8 + len(text)) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _put(descriptor: int, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]  # one call writes 2 GB at most


def _checkpoint(path: Path, weights: str | None = None) -> Said:
    from torch.utils.serialization import config

    # Mapped, the file is copied once, into the result: 100 MB in two thirds of the time.
    with config.patch("load.mmap", _stored(path)):  # type: ignore[attr-defined]
        found = checkpoint.read(path, weights)
    return {
        "source": found.source,
        "inputs": [asdict(given) for given in found.inputs],
        "kind": found.kind,
        "data": found.data,
        "about": found.about,
    }, found.state


def _stored(path: Path) -> bool:
    """Whether the bytes of tensors lie in ``path`` as they are: an archive without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # an older format, or a damaged file, which loading will find


def _safetensors(path: Path) -> Said:
    found = torchfile.header(path)
    state = checkpoint._safetensors(path) if found is None else torchfile.tensors_in(path, found)
    return {"header": found}, state


def _pt2(path: Path) -> Said:
    description, state, inputs = pt2.read(path)
    return {"model": description, "inputs": [asdict(given) for given in inputs]}, state


def _npz(path: Path) -> Said:
    given = arrays._zipped(path)
    texts = {name: str(value) for name, value in given.items() if value.dtype.kind == "U"}
    numbers = {name: value for name, value in given.items() if name not in texts}
    # PyTorch takes numbers in this machine's order of bytes only.
    return {"texts": texts}, {
        name: torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
        for name, value in numbers.items()
    }


# What holds a child, on Linux


def _confine(request: Mapping[str, Any], descriptor: int) -> None:
    """Gives up, for good, what reading a file does not need."""
    import resource

    os.setsid()  # what it might start is killed with it
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(descriptor, RESULT)
    os.closerange(RESULT + 1, 1 << 20)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    seconds, memory = math.ceil(request["seconds"]), int(request["memory"])
    for limit, most in {
        resource.RLIMIT_AS: taken * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 8 + LARGEST_HEADER + memory,
        resource.RLIMIT_NOFILE: OPEN,
        resource.RLIMIT_CORE: 0,
    }.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # At the hard limit of CPU time comes SIGKILL, which says nothing; above it SIGXCPU.
        spare = 1 if limit == resource.RLIMIT_CPU and most != hard else 0
        resource.setrlimit(limit, (most, most + spare))
    with suppress(OSError):  # if memory runs out, it is the child that goes
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if _filtering():
        rules = _rules(os.getpid())
        packed = b"".join(struct.pack("=HBBI", *rule) for rule in rules)
        program = ctypes.create_string_buffer(packed)
        held = struct.pack("@HxxxxxxP", len(rules), ctypes.addressof(program))
        _prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(held))


def _prctl(option: int, value: int, given: Any = None) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, given, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _off_the_network() -> bool:
    """Moves this process into a network of its own that leads nowhere, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (NEW_NET, NEW_USER | NEW_NET))


def _filtering() -> bool:
    """Whether system calls can be filtered here: Linux on x86-64, as :data:`CALLS` are its."""
    if platform.machine() != "x86_64" or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return False
    try:
        _prctl(PR_SET_SECCOMP, 2)
    except OSError as error:  # where it can, it asks for a program
        return error.errno == errno.EFAULT
    return False


def _rules(process: int) -> list[tuple[int, int, int, int]]:
    """The filter, as instructions of classic BPF ``(code, jump if true, if false, operand)``.

    All but :data:`CALLS` fail with ``EPERM``. ``clone3`` is unknown, so that threads are started
    with ``clone``, whose flags a filter can see. Source: ``Documentation/userspace-api/
    seccomp_filter.rst`` of the kernel.
    """
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000, 0x80000000
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    rules = [
        (load, 0, 0, 4),
        (equal, 1, 0, X86_64),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (equal, 0, 1, 435),
        (give, 0, 0, deny | errno.ENOSYS),
    ]
    for call, argument, test, value, fits in (
        (2, 1, any_of, writing, False),  # open
        (257, 2, any_of, writing, False),  # openat
        (56, 0, any_of, 0x10000, True),  # clone: threads only
        (234, 0, equal, process, True),  # tgkill: abort() signals its own process
    ):
        rules += [
            (equal, 0, 4, call),
            (load, 0, 0, 16 + 8 * argument),
            (test, 0, 1, value),
            (give, 0, 0, allow if fits else deny | errno.EPERM),
            (give, 0, 0, deny | errno.EPERM if fits else allow),
        ]
    for call in CALLS.values():
        rules += [(equal, 0, 1, call), (give, 0, 0, allow)]
    return [*rules, (give, 0, 0, deny | errno.EPERM)]


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NEW_USER, NEW_NET = 0x10000000, 0x40000000
X86_64 = 0xC000003E

RESULT, OPEN = 3, 64
"""The descriptor of the result, and how many a child may have."""

CALLS = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "sched_yield": 24, "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "nanosleep": 35,
    "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "set_robust_list": 273, "getcpu": 309, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
"""System calls of x86-64 that a child may make freely: what reading files into memory takes."""
