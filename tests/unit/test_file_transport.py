"""The file transport's directories: nothing but our own files is touched, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paceline.errors import DamagedError, ServerFailedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import layout_bytes
from paceline.schema.protocol import ReplyHeader
from paceline.transport.base import Incoming, Reply
from paceline.transport.buffers import HostBuffers
from paceline.transport.delivery import RowDelivery
from paceline.transport.directories import OwnDirectory, PrivateDirectory, open_offered, remove_leftovers
from paceline.transport.feature_bytes import describe
from paceline.transport.file import FileOffer, FileReceiver, FileSender
from paceline.transport.negotiation import TransportRefused, host_facts
from random_features import random_features
from small_engine import small_row

CPU = torch.device("cpu")
HOST = host_facts(CPU).host_id
ROW = small_row(1, num_tokens=40)
SPEC = FeatureSpec((1, 3), "supervised", greedy=True)


class Channel:
    """Both ends of a file channel."""

    def __init__(self, base: Path, stall_s: float = 30.0) -> None:
        self.buffers = HostBuffers(1 << 24)
        self.offer = FileOffer(self.buffers, CPU, base, host_facts(CPU), stall_s)
        self.parameters = self.offer.prepare()
        self.directory = Path(self.parameters["directory"])
        opened = open_offered(self.parameters["directory"], self.parameters["nonce"])
        self.sender = FileSender(opened, self.buffers)
        self.receiver: FileReceiver = self.offer.open({}, None)

    def send(self, position: int = 0) -> tuple[Reply, ReplyHeader, Features]:
        features = random_features(ROW, SPEC, seed=position)
        reply = self.sender.send(position, features)
        return reply, ReplyHeader.model_validate_json(bytes(reply.body[0])), features

    def receive(self, header: ReplyHeader) -> RowDelivery:
        _, layout = describe(0, random_features(ROW, SPEC))
        buffer = self.receiver.reserve(layout_bytes(layout))
        return self.receiver.receive(Incoming(header, layout, buffer, None))

    def files(self, suffix: str) -> list[Path]:
        return sorted(self.directory.glob(f"*.{suffix}"))


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    made = Channel(tmp_path)
    yield made
    made.sender.close()
    made.receiver.close()
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_private_and_a_file_that_was_read_is_written_again(channel: Channel) -> None:
    assert channel.directory.stat().st_mode & 0o777 == 0o700
    inodes = set()
    for position in range(20):
        reply, header, features = channel.send(position)
        reply.sent(True)
        inodes.add(channel.files("safetensors")[0].stat().st_ino)
        assert channel.files("safetensors")[0].stat().st_mode & 0o777 == 0o600
        delivery = channel.receive(header)
        assert delivery.take().hidden.equal(features.hidden)
        delivery.release()
        assert len(channel.files("free")) == 1
    assert len(inodes) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone", "link"])
def test_a_file_that_is_not_what_was_written_is_damage(channel: Channel, damage: str, tmp_path: Path) -> None:
    _, header, _ = channel.send()
    file = channel.files("safetensors")[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"0")
    else:
        file.rename(outside)
        if damage == "link":
            file.symlink_to(outside)
    with pytest.raises(DamagedError):
        channel.receive(header)
    assert channel.receive(channel.send()[1]).take().num_tokens == 40
    outside.unlink(missing_ok=True)


def test_a_reply_that_names_no_file_is_damage(channel: Channel) -> None:
    _, header, _ = channel.send()
    with pytest.raises(DamagedError, match="names no file"):
        channel.receive(header.model_copy(update={"file": None}))
    channel.receiver.drop(header)
    assert channel.files("safetensors") == []


def test_a_reply_that_could_not_be_sent_leaves_no_file(channel: Channel) -> None:
    reply, _, _ = channel.send()
    assert len(channel.files("safetensors")) == 1
    reply.sent(False)
    assert channel.files("safetensors") == []


def test_a_file_that_no_reply_named_is_removed_some_time_after_the_loss(tmp_path: Path) -> None:
    channel = Channel(tmp_path, stall_s=0.05)
    reply, _, _ = channel.send()
    reply.sent(True)
    channel.receiver.lost(0)
    channel.receiver.reserve(10)
    assert len(channel.files("safetensors")) == 1
    time.sleep(0.15)
    channel.receiver.reserve(10)
    assert channel.files("safetensors") == []
    channel.sender.close()
    channel.receiver.close()


def test_no_room_is_an_error_that_names_the_directory_and_the_remedy(channel: Channel) -> None:
    class Full(PrivateDirectory):
        def open(self, name: str, flags: int) -> int:
            del name, flags
            return os.open("/dev/full", os.O_WRONLY)

    sender = FileSender(Full(channel.directory), channel.buffers)
    with pytest.raises(ServerFailedError, match=rf"no room in {channel.directory.parent}.*--shm-size") as caught:
        sender.send(3, random_features(ROW, SPEC))
    assert caught.value.retryable
    assert channel.files("part") == channel.files("safetensors") == []


@pytest.mark.parametrize("wrong", ["nonce", "name", "parent", "missing", "link", "open_to_others", "file"])
def test_a_server_refuses_what_is_not_the_clients_own_directory(tmp_path: Path, wrong: str) -> None:
    own = OwnDirectory(tmp_path, HOST)
    path, nonce = own.directory.path, own.nonce
    if wrong == "nonce":
        nonce = "0" * 32
    elif wrong == "name":
        path = tmp_path
    elif wrong == "parent":
        path = tmp_path / "x" / ".." / path.name
    elif wrong == "missing":
        path = path.with_name("paceline-" + "0" * 32)
    elif wrong == "link":
        path = path.with_name("paceline-" + "0" * 32)
        path.symlink_to(own.directory.path)
    elif wrong == "open_to_others":
        path.chmod(0o755)
    else:
        path = path.with_name("paceline-" + "0" * 32)
        path.write_text("x")
    with pytest.raises(TransportRefused):
        open_offered(str(path), nonce)
    own.directory.path.chmod(0o700)
    open_offered(str(own.directory.path), own.nonce).close()
    own.destroy()


def killed_owner(base: Path) -> None:
    """A process that made a directory, with a row in it, and was killed."""
    program = f"""
        import os, signal
        from pathlib import Path
        from paceline.transport.directories import OwnDirectory
        own = OwnDirectory(Path({str(base)!r}), {HOST!r})
        for name in ("0" * 32 + ".safetensors", "1" * 32 + ".part"):
            os.close(own.directory.open(name, os.O_CREAT | os.O_WRONLY))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)


def test_what_a_dead_owner_left_is_removed_by_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    killed_owner(tmp_path)
    (left,) = tmp_path.iterdir()
    assert len(list(left.iterdir())) == 4
    living = OwnDirectory(tmp_path, HOST)
    elsewhere = OwnDirectory(tmp_path, "another host")
    elsewhere_path = elsewhere.directory.path
    os.close(elsewhere._lock_fd)  # it died, for all that this host can see
    (tmp_path / "somebody's").mkdir()
    (tmp_path / ("paceline-" + "f" * 32)).mkdir(0o700)  # being made just now
    assert remove_leftovers(tmp_path, HOST) == 1
    assert not left.exists()
    assert living.directory.path.exists()
    assert elsewhere_path.exists()
    assert len(list(tmp_path.iterdir())) == 4
    living.destroy()


def test_files_of_others_in_a_left_directory_stay(tmp_path: Path) -> None:
    killed_owner(tmp_path)
    (left,) = tmp_path.iterdir()
    (left / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path, HOST)
    assert [file.name for file in left.iterdir()] == ["notes.txt"]


def test_a_sender_whose_client_has_gone_leaves_nothing(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    channel.receiver.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Exception, match="could not be written"):
        channel.send()
    channel.sender.close()
    assert list(tmp_path.iterdir()) == []
