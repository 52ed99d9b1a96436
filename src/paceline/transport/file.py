"""The file transport: a row is a safetensors file in a directory that server and client both see.

Written under one name and published under another, so that nobody sees half a row; read into the row's buffer, proved,
and given back: the server writes a later row into the same pages, which costs two thirds of fresh ones in /dev/shm.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash

from paceline.errors import DamagedError, ServerFailedError, TransportError
from paceline.schema.features import Features
from paceline.schema.layout import layout_bytes
from paceline.schema.protocol import HostFacts, ReplyHeader
from paceline.schema.wire import LENGTH_BYTES, checksum, encode_reply_head, head_length
from paceline.transport.base import JSON, Incoming, Reply, RowBuffer
from paceline.transport.buffers import HostBuffers, HostBytes
from paceline.transport.delivery import HostToTrainer, RowDelivery
from paceline.transport.directories import OwnDirectory, PrivateDirectory, open_offered, remove_leftovers
from paceline.transport.feature_bytes import describe
from paceline.transport.negotiation import OpenedSender, SenderRequest, TransportRefused

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - private directories are made in it
_PIECE_BYTES = 1 << 20
"""Copied and hashed at a time: what was copied is still in the cache when it is hashed."""
_MAX_FREE_FILES = 2
_CLOSE_S = 5.0
"""Readers get so long to leave a directory that is to be removed."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_logger = logging.getLogger(__name__)


class FileSenders:
    """Opens a server's ends of file channels (negotiation.OpenSender)."""

    def __init__(self, buffers: HostBuffers) -> None:
        """`buffers` may be shared by all sessions of a server; pinned where the engine runs on a GPU."""
        self._buffers = buffers

    def __call__(self, request: SenderRequest) -> OpenedSender:
        """Raises TransportRefused where the two processes do not see the same directory."""
        directory = open_offered(request.parameters.get("directory", ""), request.parameters.get("nonce", ""))
        remove_leftovers(directory.path.parent, request.server.host_id)
        return OpenedSender(FileSender(directory, self._buffers), {})


class FileSender:
    """The server's end: writes each row into a file and sends its name."""

    def __init__(self, directory: PrivateDirectory, buffers: HostBuffers) -> None:
        """`directory` is closed with the sender."""
        self._directory = directory
        self._bytes = HostBytes(buffers)
        self._lock = threading.Lock()
        """Guards what `close` touches."""
        self._published: set[str] = set()
        """Files whose replies have not left yet."""
        self._is_writing = False
        self._closed = False

    def send(self, position: int, features: Features) -> Reply:
        header, layout = describe(position, features)
        pieces: tuple[bytes | memoryview, ...] = (encode_reply_head(header, layout), *self._bytes.of(features, layout))
        name = f"{secrets.token_hex(16)}.safetensors"
        with self._lock:
            self._check_open(position)
            self._is_writing = True
        try:
            file_checksum = self._write(position, name, pieces)
        finally:
            with self._lock:
                self._is_writing = False
                self._published.add(name)
                if self._closed:
                    self._leave()
        with self._lock:
            self._check_open(position)
        told = header.model_copy(update={"file": name, "file_checksum": file_checksum})
        body = told.model_dump_json().encode()
        return Reply((body,), JSON, checksum(body), sent=lambda left: self._sent(name, left))

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed and not self._is_writing:
                self._leave()

    def _check_open(self, position: int) -> None:
        if self._closed:
            raise TransportError(f"the channel is closed: row {position} is not sent")

    def _leave(self) -> None:
        """Remove what nobody will read; the lock is held."""
        for name in self._published:
            self._directory.remove(name)
        self._directory.remove_if_left()
        self._directory.close()

    def _sent(self, name: str, left: bool) -> None:
        with self._lock:
            if name in self._published and not self._closed:
                self._published.remove(name)
                if not left:
                    self._directory.remove(name)

    def _write(self, position: int, name: str, pieces: tuple[bytes | memoryview, ...]) -> str:
        """Publish a file, whose checksum is returned.

        Raises:
            ServerFailedError: there is no room for it.
            TransportError: the client has removed the directory.
        """
        part = f"{Path(name).stem}.part"
        try:
            fd = self._open_part(part)
            try:
                digest, num_bytes = xxhash.xxh3_64(), 0
                for piece in pieces:
                    num_bytes += _write_all(fd, memoryview(piece), digest)
                os.ftruncate(fd, num_bytes)
            finally:
                os.close(fd)
            self._directory.rename(part, name)
        except OSError as error:
            self._directory.remove(part)
            where = self._directory.path
            if error.errno in _FULL:
                raise ServerFailedError(
                    f"row {position} of {sum(map(len, pieces))} bytes finds no room in {where.parent}: make it larger "
                    "(containers: --shm-size), lower transport.prefetch_rows, or set transport.directory elsewhere or "
                    "transport.kind = http"
                ) from error
            raise TransportError(f"row {position} could not be written to {where}: {error}") from error
        return digest.hexdigest()

    def _open_part(self, part: str) -> int:
        """A file to write to: one that was read, else a new one."""
        for free in self._directory.names():
            if free.endswith(".free"):
                try:
                    self._directory.rename(free, part)
                    return self._directory.open(part, os.O_WRONLY)
                except FileNotFoundError:
                    continue  # the client has removed it meanwhile
        return self._directory.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


class FileOffer:
    """The offer of a directory, made for one session (receiving.ReceiverOffer)."""

    def __init__(
        self, buffers: HostBuffers, device: torch.device, base: Path, client: HostFacts, stall_s: float
    ) -> None:
        self._buffers = buffers
        self._device = device
        self._base = base
        self._client = client
        self._stall_s = stall_s
        self._own: OwnDirectory | None = None

    def prepare(self) -> Mapping[str, str]:
        remove_leftovers(self._base, self._client.host_id)
        try:
            self._own = OwnDirectory(self._base.absolute(), self._client.host_id)
        except OSError as error:
            raise TransportRefused(
                f"no directory can be made in {self._base} ({error.strerror}): set transport.directory"
            ) from error
        return {"directory": str(self._own.directory.path), "nonce": self._own.nonce}

    def open(self, parameters: Mapping[str, str], call_store: object) -> FileReceiver:
        """The client's end, which owns the directory from now on."""
        del parameters, call_store
        own, self._own = self._own, None
        assert own is not None, "an offer is prepared, and opened once"
        return FileReceiver(own, self._buffers, self._device, self._stall_s)

    def withdraw(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.destroy()


class FileReceiver:
    """The client's end: reads files into rows' buffers and delivers them on the trainer's device."""

    def __init__(self, own: OwnDirectory, buffers: HostBuffers, device: torch.device, stall_s: float) -> None:
        """`own` goes with the receiver; files that no reply named for twice `stall_s` are removed after a loss."""
        self._own = own
        self._buffers = buffers
        self._to_trainer = HostToTrainer(device)
        self._unclaimed_s = 2 * stall_s
        self._sweep_at: float | None = None
        self._changed = threading.Condition()
        """Guards the directory against being closed under a reader."""
        self._num_readers = 0
        self._closed = False

    def reserve(self, num_bytes: int) -> RowBuffer:
        sweep_at = self._sweep_at
        if sweep_at is not None and time.monotonic() >= sweep_at:
            self._sweep()
        return self._buffers.reserve(num_bytes)

    def receive(self, parcel: Incoming) -> RowDelivery:
        name = self._name(parcel.header)
        try:
            with self._reading() as directory:
                fd = directory.open(name, os.O_RDONLY)
                try:
                    self._read(fd, parcel)
                finally:
                    os.close(fd)
                    self._free(directory, name)
        except (OSError, TransportRefused) as error:
            raise DamagedError(f"row {parcel.header.position} cannot be read from {name}: {error}") from error
        return self._to_trainer.deliver(parcel)

    def drop(self, header: ReplyHeader) -> None:
        if header.file is not None:
            with contextlib.suppress(TransportError), self._reading() as directory:
                self._free(directory, header.file)

    def lost(self, position: int) -> None:
        """Its file is there or not, under a name that was not told: it is removed when all others have been read."""
        del position
        self._sweep_at = time.monotonic() + self._unclaimed_s

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._num_readers == 0, _CLOSE_S)
            if self._num_readers == 0:
                self._own.destroy()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[PrivateDirectory]:
        """The directory, which stays open in the block."""
        with self._changed:
            if self._closed:
                raise TransportError("the channel is closed")
            self._num_readers += 1
        try:
            yield self._own.directory
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()
                if self._closed and self._num_readers == 0:
                    self._own.destroy()

    def _name(self, header: ReplyHeader) -> str:
        if header.file is None or header.file_checksum is None:
            raise DamagedError(f"the reply to row {header.position} names no file and its checksum")
        return header.file

    def _read(self, fd: int, parcel: Incoming) -> None:
        """Fill the buffer; DamagedError if the file is not what was written."""
        header, num_bytes = parcel.header, layout_bytes(parcel.layout)
        first = memoryview(bytearray(LENGTH_BYTES))
        digest = xxhash.xxh3_64()
        _read_all(fd, first, digest)
        head = memoryview(bytearray(head_length(first)))
        _read_all(fd, head, digest)
        size, expected = os.fstat(fd).st_size, LENGTH_BYTES + len(head) + num_bytes
        if size != expected:
            raise DamagedError(f"row {header.position} is a file of {size} bytes, {expected} are expected")
        _read_all(fd, memoryview(parcel.buffer.memory[:num_bytes].numpy().data), digest)
        if digest.hexdigest() != header.file_checksum:
            raise DamagedError(
                f"row {header.position} is a file of checksum {digest.hexdigest()}, {header.file_checksum} was written"
            )

    def _free(self, directory: PrivateDirectory, name: str) -> None:
        """The file was read, or is not wanted: its pages may hold another row."""
        with contextlib.suppress(FileNotFoundError):
            if sum(other.endswith(".free") for other in directory.names()) < _MAX_FREE_FILES:
                directory.rename(name, f"{Path(name).stem}.free")
            else:
                directory.remove(name)

    def _sweep(self) -> None:
        """Remove files that were written long ago and named by no reply."""
        self._sweep_at = None
        with contextlib.suppress(TransportError), self._reading() as directory:
            for name in directory.names():
                if name.endswith((".safetensors", ".part")) and directory.age_s(name) > self._unclaimed_s:
                    _logger.info("removed %s, which no reply has named", name)
                    directory.remove(name)


def _write_all(fd: int, view: memoryview, digest: xxhash.xxh3_64) -> int:
    done = 0
    while done < view.nbytes:
        piece = view[done : done + _PIECE_BYTES]
        num_written = os.write(fd, piece)
        digest.update(piece[:num_written])
        done += num_written
    return done


def _read_all(fd: int, view: memoryview, digest: xxhash.xxh3_64) -> None:
    done = 0
    while done < view.nbytes:
        num_read = os.readv(fd, [view[done : done + _PIECE_BYTES]])
        if not num_read:
            raise DamagedError(f"a file ends {view.nbytes - done} bytes early")
        digest.update(view[done : done + num_read])
        done += num_read
