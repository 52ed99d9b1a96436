"""A vLLM server as a child process: loopback only, behind a key, hidden states into a private directory."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from paceline.errors import TargetError
from paceline.target.hf.loading import load_config

logger = logging.getLogger(__name__)

_END_S = 5.0
_LOG_EVERY_S = 30.0
_NUM_LOG_LINES = 15
_QUIET = {
    "HF_HUB_OFFLINE": "1",  # it is given a directory
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # where its own processes meet
}


@dataclass(frozen=True, slots=True)
class VLLMAddress:
    """Where a vLLM server answers and where its connector writes."""

    url: str
    """http(s)://HOST:PORT"""
    directory: Path
    """The connector's `shared_storage_path`, as seen from here; nobody else's files may lie in it."""
    layers: tuple[int, ...]
    """The capture layers it was started for."""
    api_key: str = field(default="", repr=False)

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that opens when it is used."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.netloc, timeout=timeout_s)


def vllm_layer_ids(layers: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's ids, ascending: its i + 1 is the output of decoder layer i.

    The last is always among them: from the output of the last layer comes the final hidden state.
    """
    return sorted({layer + 1 for layer in layers} | {num_layers})


def capture_arguments(layer_ids: Sequence[int], directory: Path, connector_module: str) -> list[str]:
    """Command line options with which any vLLM from 0.27 on writes hidden states as the engine reads them."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}},
    }
    transfer = {
        "kv_connector": "HiddenStatesConnector",
        "kv_connector_module_path": connector_module,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(directory)},
    }
    return [
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
        "--no-enable-prefix-caching",  # a cached prefix is not computed again, and has no hidden states
    ]


class VLLMServer:
    """A vLLM server that lives until `close()`; usable when `__init__` returns.

    Only `connector.py` enters vLLM's process: its Python needs no paceline, ours no vLLM.
    """

    def __init__(
        self,
        python: Path,
        checkpoint: Path,
        layers: Sequence[int],
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        """Start vLLM with the Python that has it, and wait until it answers.

        Args:
            layers: capture layers of every request until the end: all that anybody will ask for.
            options: more options of vLLM's API server, e.g. `("--dtype", "float32")`.
            environment: added to this process's own.

        Raises:
            TargetError: it ended, or was not ready in time; with the last lines of its log.
        """
        num_layers = int(load_config(checkpoint).get_text_config(decoder=True).num_hidden_layers)
        layer_ids = vllm_layer_ids(layers, num_layers)
        self._root = Path(tempfile.mkdtemp(prefix="paceline-vllm-"))  # 0700
        self._log = self._root / "server.log"
        hidden = self._root / "hidden"
        hidden.mkdir()
        module = self._root / "code" / "paceline_vllm_connector.py"
        module.parent.mkdir()
        shutil.copyfile(Path(__file__).with_name("connector.py"), module)
        port = _free_port()
        self.address = VLLMAddress(f"http://127.0.0.1:{port}", hidden, tuple(layers), secrets.token_hex(16))
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *capture_arguments(layer_ids, hidden, module.stem),
            *options,
        ]
        secret = {"VLLM_API_KEY": self.address.api_key, "PYTHONPATH": str(module.parent)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # the user's own Python
                command,
                env=os.environ | _QUIET | dict(environment or {}) | secret,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # vLLM's workers end with its process group, not with the server
            )
        try:
            self._wait_until_ready(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End vLLM and its workers, and remove what they wrote. Safe to call twice."""
        for number, wait_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        shutil.rmtree(self._root, ignore_errors=True)

    def _wait_until_ready(self, timeout_s: float) -> None:
        begin = time.monotonic()
        told = begin
        while not _is_ready(self.address):
            if self._process.poll() is not None:
                raise TargetError(
                    f"vLLM ended with code {self._process.returncode} before it was ready:\n{self._tail()}"
                )
            now = time.monotonic()
            if now - begin > timeout_s:
                raise TargetError(f"vLLM was not ready after {timeout_s:.0f} s:\n{self._tail()}")
            if now - told > _LOG_EVERY_S:
                told = now
                logger.info("waiting for vLLM at %s for %.0f s", self.address.url, now - begin)
            time.sleep(0.2)
        logger.info("vLLM is ready at %s after %.0f s", self.address.url, time.monotonic() - begin)

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(address: VLLMAddress) -> bool:
    connection = address.connect(timeout_s=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
