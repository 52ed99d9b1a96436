"""One document through an SGLang server: the request, and the files of hidden states that answer it."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paceline.errors import CaptureMismatchError, TargetError, TransportError
from paceline.target.engines.document_requests import DocumentRequests, growing_pauses, states_of
from paceline.target.engines.interface import CapturedDocument, EngineAddress, Place
from paceline.target.sglang.server import HOOK_FACTORY

_CHANGE_STATES = (
    *("allow_auto_truncate", "enable_dp_attention", "enable_two_batch_overlap", "enable_pdmux"),
    *("enable_attn_tp_input_scattered", "enable_mixed_chunk", "enable_prefill_cp"),
    *("enable_layernorm_sp", "speculative_algorithm", "dllm_algorithm"),
)
"""Options that are refused to servers that are started here, as it tells of them."""
_SPREAD_STATES = ("pp_size", "attn_cp_size")
"""The same, of which one is none."""
_FILE_S = 60.0
"""Files are on their way when the answer comes."""


class SGLangRequests(DocumentRequests):
    """Documents through one SGLang server."""

    def __init__(self, address: EngineAddress) -> None:
        self._weight_version: object = None
        """Of the first answer."""
        super().__init__("SGLang", address)

    def is_alive(self) -> bool:
        """Whether its HTTP process answers, which ends with its scheduler.

        Its /health asks for a token and waits for it: a scheduler that compiles a kernel would be taken for dead.
        """
        return self._calls.is_healthy("/model_info")

    def _ask_max_tokens(self) -> int:
        served = self._calls.call("GET", "/server_info")
        try:
            max_tokens = int(served["max_req_input_len"]) - 1
            if "max_total_num_tokens" in served:  # of documents that leave no room in it SGLang computes no token
                max_tokens = min(max_tokens, int(served["max_total_num_tokens"]) - 2 * int(served["page_size"]) - 2)
        except (KeyError, TypeError, ValueError) as error:
            raise TargetError(
                f"{self.name} does not say how many tokens it takes ({error!r}): is it SGLang?"
            ) from error
        self._check_options(served)
        return max_tokens

    def _capture(self, sent: list[int], name: str, place: Place | None) -> CapturedDocument:
        rid = f"{name}-0"  # begins the names of its files
        body = {
            "input_ids": sent,
            "rid": rid,
            "sampling_params": {
                "max_new_tokens": 1,
                "temperature": 0,
                "repetition_penalty": 1.0,  # a checkpoint's generation_config.json may say otherwise
                "ignore_eos": True,
            },
        }
        answer = self._calls.call("POST", "/generate", body)
        next_token = self._next_token(answer)
        self._check_weights(answer)
        parts = self._read_parts(rid, len(sent), place)
        received = [token for part in parts for token in part["token_ids"].tolist()]
        if received != sent:
            raise CaptureMismatchError(
                f"SGLang captured {len(received)} tokens {received[:8]}..., {len(sent)} were sent: {sent[:8]}..."
            )
        hidden = _join([part["hidden_states"] for part in parts], place)
        return CapturedDocument(hidden, parts[0]["layer_ids"].tolist(), next_token)

    def _check_options(self, served: dict[str, Any]) -> None:
        hooks = served.get("forward_hooks") or []
        ours = [hook for hook in hooks if hook.get("hook_factory") == HOOK_FACTORY]
        problem = None
        if not ours:
            problem = "writes no hidden states"
        elif not served.get("disable_radix_cache"):
            problem = "has its radix cache on, whose tokens have no hidden states"
        elif graph := _prefill_graph(served):
            problem = f'computes prompts by CUDA graphs ("{graph}"), which run no hooks'
        elif spreading := _refused(served):
            problem = f"runs with {', '.join(spreading)}, under which hooks see other states"
        if problem is not None:
            raise TargetError(
                f"{self.name} {problem}: start it with the options that `paceline doctor MODEL --engine sglang "
                "--show-command` prints"
            )

    def _next_token(self, answer: dict[str, Any]) -> int:
        reason = (answer.get("meta_info") or {}).get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise TransportError(f"{self.name} ended a request: {reason.get('message')}")
        tokens = answer.get("output_ids")
        if not isinstance(tokens, list) or len(tokens) != 1:
            raise TransportError(f"{self.name} answered with tokens {tokens}, one was asked for ({reason or answer})")
        return int(tokens[0])

    def _check_weights(self, answer: dict[str, Any]) -> None:
        """Others may replace the weights of a server that is theirs."""
        version = (answer.get("meta_info") or {}).get("weight_version")
        if self._weight_version is None:
            self._weight_version = version
        if version != self._weight_version:
            raise TargetError(
                f"{self.name} has other weights than before: version {version!r}, it was {self._weight_version!r}"
            )

    def _read_parts(self, rid: str, num_tokens: int, place: Place | None) -> list[dict[str, Tensor]]:
        """One part a prefill chunk, in the order of tokens; with its states, wherever they are."""
        deadline = time.monotonic() + _FILE_S
        parts: list[dict[str, Tensor]] = []
        first = 0
        while first < num_tokens:
            part = self._read(rid, first, deadline)
            part["hidden_states"] = states_of(part, place, first)
            length = len(part["token_ids"])
            if len(part["hidden_states"]) != length:
                raise CaptureMismatchError(
                    f"SGLang captured {len(part['hidden_states'])} states of {length} tokens: options of it spread "
                    "tokens over GPUs"
                )
            if not 0 < length <= num_tokens - first:
                raise CaptureMismatchError(
                    f"SGLang captured {length} tokens from token {first} on of a document of {num_tokens}"
                )
            parts.append(part)
            first += length
        return parts

    def _read(self, rid: str, first: int, deadline: float) -> dict[str, Tensor]:
        """The tensors of a file, which is removed."""
        path = self._directory / f"{rid}.{first}.safetensors"
        for _ in growing_pauses():
            if path.exists():
                break
            self._raise_fault(rid)
            if self._calls.closed or time.monotonic() > deadline:
                raise TransportError(
                    f"{self.name} answered, and wrote no {path.name} within {_FILE_S:.0f} s: what its log says of "
                    "hidden states, or of forward hooks, tells why"
                )
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise TransportError(f"hidden states in {path} cannot be read ({error})") from error
        finally:
            path.unlink(missing_ok=True)

    def _raise_fault(self, rid: str) -> None:
        """What the engine says instead of a file."""
        path = self._directory / f"{rid}.error"
        if path.exists():
            raise TransportError(f"{self.name}: {path.read_text(encoding='utf-8')}")


def _join(pieces: list[Tensor], place: Place | None) -> Tensor:
    """[n, L, H]: nothing is copied where the engine has put all pieces in their place."""
    if len(pieces) == 1:
        return pieces[0]
    if place is not None:
        memory = place.states.untyped_storage().data_ptr()
        if all(piece.untyped_storage().data_ptr() == memory for piece in pieces):
            return place.states
    return torch.cat(pieces)


def _refused(served: dict[str, Any]) -> list[str]:
    """Names of options under which hooks see other states."""
    names = [name for name in _CHANGE_STATES if served.get(name)]
    names += [name for name in _SPREAD_STATES if (served.get(name) or 1) != 1]
    if served.get("disaggregation_mode") not in (None, "null"):
        names.append("disaggregation_mode")
    return sorted(names)


def _prefill_graph(served: dict[str, Any]) -> str:
    """The kind of CUDA graph that prompts are computed by; "" for none, or where the server does not say."""
    phases = served.get("cuda_graph_config")
    prefill = phases.get("prefill") if isinstance(phases, dict) else None
    backend = str(prefill.get("backend") or "") if isinstance(prefill, dict) else ""
    return "" if backend == "disabled" else backend
