"""One document through a vLLM server: the request, and the file of hidden states that answers it."""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paceline.errors import CaptureMismatchError, TargetError, TransportError
from paceline.target.engines.document_requests import DocumentRequests, growing_pauses, states_of
from paceline.target.engines.interface import CapturedDocument, EngineAddress, Place
from paceline.target.vllm.server import check_version

logger = logging.getLogger(__name__)


class VLLMRequests(DocumentRequests):
    """Documents through one vLLM server."""

    def __init__(self, address: EngineAddress) -> None:
        super().__init__("vLLM", address)
        self._has_warned = False

    def _ask_max_tokens(self) -> int:
        served = self._calls.call("GET", "/v1/models")
        try:
            self._model: str = served["data"][0]["id"]
            max_tokens = int(served["data"][0]["max_model_len"]) - 1  # vLLM wants room for one token more
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TargetError(
                f"{self.name} does not say which model it serves, and of how many tokens ({error!r}): is it vLLM?"
            ) from error
        try:
            version = str(self._calls.call("GET", "/version")["version"])
        except (TargetError, KeyError, TypeError) as error:
            raise TargetError(
                f"{self.name} does not say its version ({error}): name vLLM's own address in target.engine_url, "
                "not that of a proxy"
            ) from error
        check_version(version, self.name)
        return max_tokens

    def _capture(self, sent: list[int], name: str, place: Place | None) -> CapturedDocument:
        deadline = time.monotonic() + self._calls.timeout_s
        body = {
            "request_id": name,  # becomes part of its file's name
            "model": self._model,
            "prompt": sent,
            "max_tokens": 1,
            "temperature": 0,
            "repetition_penalty": 1.0,  # a checkpoint's generation_config.json may say otherwise
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self._calls.call("POST", "/v1/completions", body)
        reported = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if reported is None:
            raise TargetError(
                f"{self.name} answers without hidden states: start it with the options that "
                "`paceline doctor MODEL --engine vllm --show-command` prints"
            )
        stored = self._read(Path(reported).name, deadline)
        received = stored["token_ids"].tolist()
        if received != sent:
            raise CaptureMismatchError(
                f"vLLM captured {len(received)} tokens {received[:8]}..., {len(sent)} were sent: {sent[:8]}..."
            )
        (next_token,) = answer["choices"][0]["token_ids"]
        layer_ids = stored["layer_ids"].tolist() if "layer_ids" in stored else self._believe_layers()
        return CapturedDocument(states_of(stored, place), [layer_id - 1 for layer_id in layer_ids], next_token)

    def _believe_layers(self) -> list[int]:
        """Those that were asked for, in vLLM's numbering; its own connector does not say which a file holds."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s writes through vLLM's own connector (its log says why, if paceline started it): files do not say "
                "which layers they hold, which the self-test must tell",
                self.name,
            )
        return [layer + 1 for layer in self.layers]

    def _read(self, name: str, deadline: float) -> dict[str, Tensor]:
        """The tensors of a file in the server's directory, which is removed; only its name is the server's word."""
        path = self._directory / name
        lock = path.with_name(name + ".lock")
        try:
            with lock.open("rb") as locked:
                self._wait_for_writer(locked.fileno(), name, deadline)
                return load_file(path)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self._directory).free if self._directory.is_dir() else 0
            raise TransportError(
                f"hidden states in {path} cannot be read ({error}), {free / 1e9:.1f} GB are free there: did vLLM's "
                "process die, or could it not write them?"
            ) from error
        finally:
            for done in (path, lock):
                done.unlink(missing_ok=True)

    def _wait_for_writer(self, descriptor: int, name: str, deadline: float) -> None:
        """Return when the connector has let go of the lock, which it held before the answer was sent."""
        for _ in growing_pauses():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._calls.closed or time.monotonic() > deadline:
                    raise TransportError(f"{name} was still being written when its time was over") from None
