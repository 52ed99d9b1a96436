"""One document through a vLLM server: the request, and the file of hidden states that answers it."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paceline.errors import CaptureMismatchError, TargetError, TransportError
from paceline.target.engines.http_calls import EngineCalls
from paceline.target.engines.interface import CapturedDocument, EngineAddress
from paceline.target.engines.own_files import OwnFiles

_LONGEST_RECHECK_S = 0.02


class VLLMRequests:
    """Documents through one server (`target.engines.interface.DocumentServer`)."""

    def __init__(self, address: EngineAddress) -> None:
        """Ask the server what it serves.

        Raises:
            TransportError: it does not answer.
            TargetError: it refuses.
        """
        self.name = f"vLLM at {address.url}"
        self.layers = address.layers
        self._directory = address.directory
        self._calls = EngineCalls(self.name, address.url, address.key)
        served = self._calls.call("GET", "/v1/models")
        try:
            self._model: str = served["data"][0]["id"]
            max_model_len = int(served["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TargetError(
                f"{self.name} does not say which model it serves, and of how many tokens ({error!r}): is it vLLM?"
            ) from error
        self.max_tokens = max_model_len - 1
        """Of one document: vLLM wants room for one token more."""
        self._files = OwnFiles(address.directory)

    def capture(self, tokens: np.ndarray) -> CapturedDocument:
        """Hidden states of one document, int32[n]; the server's file is gone afterwards.

        Raises:
            CaptureMismatchError: other tokens or layers than were asked for.
            TransportError: the server or its file is gone; asking again, or another server, can help.
            TargetError: the server refused.
        """
        self._files.sweep()
        name = self._files.new_name()
        try:
            return self._capture(tokens.tolist(), name)
        except BaseException:
            self._files.give_up(name)
            raise

    def _capture(self, sent: list[int], name: str) -> CapturedDocument:
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
        # vLLM's own connector does not say which layers a file holds: the self-test tells.
        layer_ids = stored["layer_ids"].tolist() if "layer_ids" in stored else [layer + 1 for layer in self.layers]
        return CapturedDocument(stored["hidden_states"], [layer_id - 1 for layer_id in layer_ids], next_token)

    def is_alive(self) -> bool:
        """Whether it answers /health."""
        return self._calls.is_healthy()

    def close(self) -> None:
        """End the requests that are out; their threads see a TransportError."""
        self._calls.close()
        self._files.close()

    def _read(self, name: str, deadline: float) -> dict[str, Tensor]:
        """The tensors of a file in the server's directory, which is removed; only its name is the server's word."""
        path = self._directory / name
        lock = path.with_name(name + ".lock")
        try:
            with lock.open("rb") as locked:
                self._wait_for_writer(locked.fileno(), name, deadline)
                return load_file(path)
        except (OSError, SafetensorError) as error:
            raise TransportError(
                f"hidden states in {path} cannot be read ({error}): did vLLM's process die?"
            ) from error
        finally:
            for done in (path, lock):
                done.unlink(missing_ok=True)

    def _wait_for_writer(self, descriptor: int, name: str, deadline: float) -> None:
        """Return when the connector has let go of the lock, which it held before the answer was sent."""
        pause_s = 0.0005
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._calls.closed or time.monotonic() > deadline:
                    raise TransportError(f"{name} was still being written when its time was over") from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_RECHECK_S)
            else:
                return
