"""Checkpoints: all of a run's state at one step boundary, written in the background, published by one rename."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import barrier
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from paceline.config.run_dir import RunDir
from paceline.errors import CheckpointError, RunDirectoryError
from paceline.training import checkpoint_files as files
from paceline.training.ranks import Ranks

logger = logging.getLogger(__name__)

_STATE = "state.json"
_PUBLISHED = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\.(writing|removing|replaced)-(step-\d{8})")
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)
_ASSUMED_BYTES_PER_S = 150e6
"""Writing speed of a plain disk, until a checkpoint of this run has been timed."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation of a draft so far."""

    step: int
    acceptance_length: float


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds besides tensors."""

    step: int
    """Optimizer steps done."""
    position: int
    """Next position of the stream to train."""
    rows_per_step: int
    num_steps: int
    """Steps the schedules span."""
    attempt: int
    evaluated_step: int | None
    """The last step that was evaluated."""
    best: dict[str, Best]
    """By draft."""
    zero_weight_steps: dict[str, int]
    """By draft."""
    rng: list[dict[str, Any]]
    """By rank."""

    @classmethod
    def from_json(cls, text: str) -> TrainingState:
        """The inverse of `json.dumps(asdict(state))`."""
        state = json.loads(text)
        state["best"] = {name: Best(**best) for name, best in state["best"].items()}
        return cls(**state)


class CheckpointStore:
    """The checkpoints of one run, for its trainer ranks: a directory that all of them see.

    consumes: state at step boundaries      waits for: the write before, as there is one at a time
    unblocked by: that write's end or failure, which the next call raises

    Rank 0 writes all there is, but for tensors of which each rank has a shard (DTensor): then every rank writes its
    own, and rank 0 publishes when all have.
    """

    def __init__(self, run: RunDir, run_id: str, keep: int, asynchronous: bool, ranks: Ranks) -> None:
        """`run_id` marks what this run wrote: nothing else is ever removed or loaded. `keep` counts the newest."""
        self._ranks = ranks
        self._run = run
        self._run_id = run_id
        self._keep = keep
        self._asynchronous = asynchronous
        self._staged: dict[str, Tensor] = {}
        self._host_mesh: DeviceMesh | None = None
        self._write_under_way: Future[None] | None = None
        self._seconds: float | None = None

    def save(self, state: TrainingState, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint of `state` and `tensors` as they are now; they may change once this returns.

        Asynchronously it returns after a copy to host memory was made (on a GPU: was enqueued). Every rank calls it.

        Raises:
            CheckpointError: this write, or an asynchronous one before it, failed; the last checkpoint stands.
        """
        self.wait()
        if not self._ranks.is_first and not _are_shards(tensors):
            return
        if not self._asynchronous:
            self._write(state, tensors, None)
            return
        copied = self._stage(tensors)
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._write_under_way = writer.submit(self._write, state, self._staged, copied)
        writer.shutdown(wait=False)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether no write is under way any more, within `timeout_s`.

        Raises:
            CheckpointError: the write failed.
        """
        if self._write_under_way is not None:
            wait_for([self._write_under_way], timeout_s)
        self.check()
        return self._write_under_way is None

    def check(self) -> None:
        """Raise what a write in the background has failed with; does not wait."""
        if self._write_under_way is not None and self._write_under_way.done():
            ended, self._write_under_way = self._write_under_way, None
            ended.result()

    def settle(self, timeout_s: float) -> None:
        """Let a write under way end, for at most `timeout_s`; a failure is logged, since another one is on its way."""
        if self._write_under_way is None:
            return
        done, _ = wait_for([self._write_under_way], timeout_s)
        if done and (error := self._write_under_way.exception()) is not None:
            logger.error("%s", error)

    def expected_s(self, tensors: dict[str, Tensor]) -> float:
        """Seconds a write is expected to take: as the last one, or by size before the first."""
        if self._seconds is not None:
            return self._seconds
        return 0.5 + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / _ASSUMED_BYTES_PER_S

    def latest(self) -> Path | None:
        """The newest published checkpoint; None before the first."""
        steps = _published_steps(self._run)
        return self._run.checkpoint(steps[-1]) if steps else None

    def load(self, path: Path, tensors: dict[str, Tensor]) -> TrainingState:
        """Read a checkpoint into `tensors` (in place) after proving it undamaged.

        Raises:
            CheckpointError: a file is missing or damaged, or the tensors are not those of this run's drafts.
            RunDirectoryError: another run wrote it.
        """
        manifest = files.check_files(path) if self._ranks.is_first else files.load_manifest(path)
        if manifest["run_id"] != self._run_id:
            raise RunDirectoryError(
                f"{path} belongs to run {manifest['run_id']}, this is run {self._run_id}: choose another run_dir"
            )
        state = load_state(path)
        if state.step != manifest["step"]:
            raise CheckpointError(f"{path}: manifest says step {manifest['step']}, {_STATE} says {state.step}")
        _load_tensors(path, tensors)
        return state

    def remove_leftovers(self) -> None:
        """Clean up behind a process that died while writing; call once, before the first save. Rank 0 does it."""
        if not self._ranks.is_first:
            return
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in list(self._run.checkpoints.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None:
                continue
            published = self._run.checkpoints / match[2]
            if match[1] == "replaced" and not published.exists():
                path.rename(published)
            else:
                logger.info("removing %s, left by a run that was ended", path)
                shutil.rmtree(path)

    def _stage(self, tensors: dict[str, Tensor]) -> torch.cuda.Event | None:
        """Copy into host buffers kept from save to save; an event tells when GPU copies have arrived."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._staged.keys() != tensors.keys():
            self._staged = {name: self._host_copy(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            _local(self._staged[name]).copy_(_local(tensor), non_blocking=True)
        if not on_gpu:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _host_copy(self, tensor: Tensor) -> Tensor:
        """Host memory for a tensor, or for this rank's shard of one."""
        local = _local(tensor)
        copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        if not isinstance(tensor, DTensor):
            return copy
        if self._host_mesh is None:
            self._host_mesh = self._ranks.mesh("cpu", "full")
        return DTensor.from_local(
            copy, self._host_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write(self, state: TrainingState, tensors: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        """Write, publish and rotate."""
        start = time.perf_counter()
        final = self._run.checkpoint(state.step)
        writing = self._run.checkpoints / f".writing-{final.name}"
        try:
            if copied is not None:
                copied.synchronize()
            if self._ranks.is_first:
                self._run.checkpoints.mkdir(parents=True, exist_ok=True)
                writing.mkdir()
            self._write_tensors(tensors, writing)
            if not self._ranks.is_first:
                return
            files.write_durably(writing / _STATE, json.dumps(asdict(state)))
            files.write_manifest(writing, self._run_id, state.step)
            files.publish(writing, final, self._run.checkpoints / f".replaced-{final.name}")
            self._rotate({best.step for best in state.best.values()})
        except _WRITE_ERRORS as error:
            if self._ranks.is_first:
                shutil.rmtree(writing, ignore_errors=True)
            last = self.latest()
            stands = f"the last one stands: {last}" if last else "there is none before it"
            raise CheckpointError(f"cannot write checkpoint {final}: {_reason(error)}; {stands}") from error
        self._seconds = time.perf_counter() - start
        logger.info("checkpoint %s written in %.1f s", final, self._seconds)

    def _write_tensors(self, tensors: dict[str, Tensor], directory: Path) -> None:
        if not _are_shards(tensors):
            _expect_one_process()
            save_distributed(dict(tensors), storage_writer=_writer(directory), no_dist=True)
            return
        group = self._ranks.checkpoint_group
        barrier(group)  # the directory is there
        save_distributed(dict(tensors), storage_writer=ShardWriter(directory), process_group=group)

    def _rotate(self, best_steps: set[int]) -> None:
        """Keep the newest and the best; touch nothing that this run did not write."""
        for step in _published_steps(self._run)[: -self._keep]:
            path = self._run.checkpoint(step)
            if step in best_steps or not self._is_ours(path):
                continue
            # Renamed first: a half-removed directory must not look like a checkpoint.
            removing = self._run.checkpoints / f".removing-{path.name}"
            path.rename(removing)
            shutil.rmtree(removing)

    def _is_ours(self, path: Path) -> bool:
        try:
            return bool(files.load_manifest(path)["run_id"] == self._run_id)
        except CheckpointError:
            return False


def latest_checkpoint(run: RunDir) -> Path:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    steps = _published_steps(run)
    if not steps:
        raise CheckpointError(f"no checkpoint in {run.checkpoints}: train first")
    return run.checkpoint(steps[-1])


def best_checkpoint(run: RunDir, draft: str) -> Path:
    """The checkpoint with the draft's best acceptance length; the newest if it was never evaluated.

    Raises:
        CheckpointError: there is none, or the newest is damaged.
    """
    latest = latest_checkpoint(run)
    files.check_files(latest)
    best = load_state(latest).best.get(draft)
    return latest if best is None else run.checkpoint(best.step)


def load_state(path: Path) -> TrainingState:
    """The numbers of a checkpoint, without its tensors; its files are not proved undamaged.

    Raises:
        CheckpointError: the file is missing or is not what this version writes.
    """
    try:
        return TrainingState.from_json((path / _STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path / _STATE}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _STATE} is not a training state of this version: {error}") from error


def load_draft_weights(path: Path, draft: str) -> dict[str, Tensor]:
    """fp32 master weights of one draft by parameter name, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint has no such draft.
    """
    files.check_files(path)
    prefix = tensor_name(draft, "master/")
    saved = _saved_tensors(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith(prefix)
    }
    if not tensors:
        drafts = sorted({name.split("/")[1] for name in saved})
        raise CheckpointError(f"{path} has no draft {draft!r}; it has {', '.join(drafts)}")
    _load_tensors(path, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def tensor_name(draft: str, name: str) -> str:
    """What tensor `name` of a draft's optimizer is called in a checkpoint."""
    return f"drafts/{draft}/{name}"


def _load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place."""
    saved = _saved_tensors(path)
    for name, tensor in tensors.items():
        if name not in saved:
            raise CheckpointError(f"{path} has no tensor {name}: it was written for other drafts")
        if saved[name].size != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(saved[name].size)}, this run's has {list(tensor.shape)}"
            )
    _expect_one_process()
    load_distributed(dict(tensors), storage_reader=FileSystemReader(path), no_dist=True)


def _saved_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _published_steps(run: RunDir) -> list[int]:
    """Steps of published checkpoints, ascending."""
    if not run.checkpoints.is_dir():
        return []
    matches = (_PUBLISHED.fullmatch(path.name) for path in run.checkpoints.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _are_shards(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _expect_one_process() -> None:
    """torch warns that `no_dist` was taken to mean one process, which it does."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _writer(directory: Path) -> FileSystemWriter:
    # Copying ahead is for GPU tensors, and would open a CUDA context on device 0 in the writer's thread.
    return FileSystemWriter(directory, per_thread_copy_ahead=0)


class ShardWriter(FileSystemWriter):
    """Writes one rank's shards; its errors say why by themselves: what they came from is lost on the way to others."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except _WRITE_ERRORS as error:
            raise CheckpointError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """What the operating system said, dug out of what wraps it."""
    if isinstance(error, CheckpointException):
        for wrapped in error.failures.values():
            return _reason(wrapped[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error.__context__
    return _reason(cause) if cause is not None else str(error).splitlines()[0]
