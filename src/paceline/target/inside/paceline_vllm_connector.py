"""What vLLM loads to write hidden states to rows or files: runs in its process, needs nothing else of paceline.

vLLM's own connector copies through pinned memory, which a CPU build does not have, does not say which layers a file
holds, and leaves files of requests that are not ours. Ours is built on parts that are private to vLLM, whose names and
arguments are the same in 0.24, 0.25, 0.26 and 0.32; where they have changed, vLLM's own connector takes its place.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from paceline_shared_rows import SharedRows
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as vllms
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector

_shared_rows = SharedRows()
_logger = logging.getLogger("vllm.paceline")
_CALLS = {
    "extract_from_kv_cache": ("kv_cache", "slot_mapping", "num_tokens"),
    "ExampleHiddenStatesConnectorMetadata": ("pending_saves", "new_req_filenames"),
    "PendingSave": ("req_id", "filename", "token_ids", "block_ids"),
    "ExampleHiddenStatesConnector._write_tensors": ("tensors", "event", "filename", "lock_fd"),
    "ExampleHiddenStatesConnector._submit_async_write": ("self", "pending"),
    "ExampleHiddenStatesConnector._on_write_done": ("self", "req_id", "future"),
    "ExampleHiddenStatesConnector.build_connector_meta": ("self", "scheduler_output"),
    "ExampleHiddenStatesConnector.request_finished_all_groups": ("self", "request", "block_ids"),
}
_ATTRIBUTES = (
    *("_vllm_config", "_kv_transfer_config", "_kv_cache", "_block_size", "_is_tp_rank_zero"),
    *("_executor", "_lock_fds", "_req_copy_events", "_req_futures", "_request_filenames"),
)


def changed_parts() -> list[str]:
    """What of vLLM's connector is not as ours is written for."""
    changed = []
    for path, expected in _CALLS.items():
        part: Any = vllms
        for name in path.split("."):
            part = getattr(part, name, None)
        found = tuple(inspect.signature(part).parameters) if callable(part) else None
        if found != expected:
            changed.append(f"{path} takes {found}, not {expected}")
    names = {name for kind in ExampleHiddenStatesConnector.__mro__[:-1] for name in _names_in_init(kind)}
    return changed + [f"there is no {name}" for name in _ATTRIBUTES if name not in names]


def _names_in_init(kind: type) -> tuple[str, ...]:
    """Attributes that the constructor names, among others."""
    code = getattr(vars(kind).get("__init__"), "__code__", None)
    return code.co_names if code else ()


class _CopyOver:
    """Stands where vLLM keeps the CUDA event of a copy, when the copy was over at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class OurConnector(ExampleHiddenStatesConnector):
    """Files with `hidden_states` [n, L, H], `token_ids` int64[n] and `layer_ids` int64[L], in vLLM's numbering.

    Where a request names a place for its states, they are there, and the file has `placed` [0, L, H] instead.
    """

    def _write_tensors(
        self, tensors: dict[str, torch.Tensor], event: torch.cuda.Event | _CopyOver, filename: str, lock_fd: int | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # a GPU's: vLLM's own part meets it again, and lets go of the lock
            event.synchronize()
            states = tensors["hidden_states"]
            if _shared_rows.put(Path(filename), 0, states):
                tensors = {"placed": states[:0], "token_ids": tensors["token_ids"]}
        draft = self._vllm_config.speculative_config.draft_model_config.hf_config
        layer_ids = torch.tensor(draft.eagle_aux_hidden_state_layer_ids, dtype=torch.int64)
        super()._write_tensors(tensors | {"layer_ids": layer_ids}, event, filename, lock_fd)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Of our requests alone: nobody would remove the files of others'."""
        meta = super().build_connector_meta(scheduler_output)
        for name in [name for name in meta.new_req_filenames if not self._is_ours(name)]:
            del meta.new_req_filenames[name], self._request_filenames[name]
        return meta

    def _is_ours(self, request_id: str) -> bool:
        return self._kv_transfer_config.get_from_extra_config("paceline_prefix", "") in request_id

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if not self._is_ours(request.request_id):
            return False, None
        try:
            answer: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(request, block_ids)
            return answer
        except KeyError:
            # Up to 0.26 a request that was given up before its turn has no file, and vLLM would end here. That it is
            # still being sent is right for it: its next step reports everything without a copy as sent.
            return True, None

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache.device.type != "cpu":
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.int64)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        # Indexing copies: vLLM may give the blocks to another request as soon as this returns.
        states = vllms.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.to(torch.int64)}
        over = _CopyOver()
        lock_fd = self._lock_fds.pop(pending.req_id, None)  # locked before the client was told of the file
        future = self._executor.submit(self._write_tensors, tensors, over, pending.filename, lock_fd)
        self._req_copy_events[pending.req_id] = over
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))


HiddenStatesConnector: type[ExampleHiddenStatesConnector] = OurConnector
if _changed := changed_parts():
    _logger.warning("paceline's connector does not fit this vLLM, whose own takes its place: %s", "; ".join(_changed))
    HiddenStatesConnector = ExampleHiddenStatesConnector
