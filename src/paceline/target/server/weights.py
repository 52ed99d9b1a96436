"""GET and POST /v1/weights/{table}: the target's embedding and lm_head, streamed as safetensors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import xxhash
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from paceline.errors import WireError
from paceline.schema.layout import ELEMENT_BYTES
from paceline.schema.protocol import CHECKSUM_HEADER, MAX_CONTROL_BYTES, RowsAsked
from paceline.schema.wire import encode_tensor_head
from paceline.target.server.answers import Refusal, describe_invalid
from paceline.target.server.bodies import finish_body, read_body, send_body, send_head, until_gone
from paceline.target.server.settings import ServerSettings
from paceline.transport.base import SAFETENSORS

_CHUNK_BYTES = 4 << 20
_FLOATS = tuple(name for name in ELEMENT_BYTES if "float" in name)


class Table(Protocol):
    """A weight of the target as it lies in its checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: slice | np.ndarray) -> torch.Tensor:
        """Some rows, in the stored dtype; int64 indices in any order.

        Raises:
            TargetError: the file cannot be read, or its numbers are not floating point.
        """


class WeightTables(Protocol):
    """Where a server's weights come from."""

    def table(self, name: str) -> Table | None:
        """ "embedding", "lm_head" or "lm_head_bias"; None where the target has no such tensor."""


class WeightRoute:
    """The ASGI application of weight requests. A table is read twice: for its checksum, and to be sent."""

    def __init__(self, tables: WeightTables, dtype: str, settings: ServerSettings) -> None:
        """`dtype` is what is sent where none is asked for."""
        self._tables = tables
        self._dtype = dtype
        self._settings = settings
        self._checksums: dict[tuple[str, str], str] = {}
        """Of whole tables, by name and dtype."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["table"]
        table = self._tables.table(name)
        if table is None:
            raise Refusal("not_found", f"this target has no {name}")
        dtype = QueryParams(scope["query_string"]).get("dtype", self._dtype)
        if dtype not in _FLOATS:
            raise WireError(f"dtype must be one of {', '.join(_FLOATS)}")
        rows = None
        if scope["method"] == "POST":
            body = await read_body(scope, receive, MAX_CONTROL_BYTES, self._settings.body_timeout_s)
            rows = _rows_asked(body, name, table.shape[0])
        shape = (table.shape[0] if rows is None else len(rows), *table.shape[1:])
        head = encode_tensor_head(name, dtype, shape)
        checksum = await run_in_threadpool(self._checksum, name, table, rows, dtype, head)
        length = len(head) + math.prod(shape) * ELEMENT_BYTES[dtype]
        headers = {"content-type": SAFETENSORS, "content-length": str(length), CHECKSUM_HEADER: checksum}
        gone = asyncio.create_task(until_gone(receive))
        try:
            await send_head(send, 200, headers)
            await send_body(scope, send, [head], self._settings.stall_timeout_s)
            chunks = _chunks(table, rows, dtype)
            while (chunk := await run_in_threadpool(next, chunks, None)) is not None:
                await send_body(scope, send, [chunk], self._settings.stall_timeout_s)
            await finish_body(send, gone)
        finally:
            gone.cancel()

    def _checksum(self, name: str, table: Table, rows: np.ndarray | None, dtype: str, head: bytes) -> str:
        known = self._checksums.get((name, dtype)) if rows is None else None
        if known is not None:
            return known
        digest = xxhash.xxh3_64(head)
        for chunk in _chunks(table, rows, dtype):
            digest.update(chunk)
        if rows is None:
            self._checksums[name, dtype] = digest.hexdigest()
        return digest.hexdigest()


def _rows_asked(body: bytearray, name: str, num_rows: int) -> np.ndarray:
    try:
        rows = np.asarray(RowsAsked.model_validate_json(body).rows, np.int64)
    except ValidationError as error:
        raise WireError(f"the rows that are asked for: {describe_invalid(error)}") from error
    except OverflowError as error:
        raise WireError(f"{name} has {num_rows} rows; a number that fits in 64 bits was expected") from error
    if len(rows) > num_rows:
        raise WireError(f"{len(rows)} rows of {name} are asked for, it has {num_rows}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
        raise WireError(f"rows {rows.min()} to {rows.max()} of {name} are asked for, it has {num_rows}")
    return rows


def _chunks(table: Table, rows: np.ndarray | None, dtype: str) -> Iterator[memoryview]:
    """The bytes of a table, or of some of its rows, a few megabytes at a time."""
    wanted = getattr(torch, dtype)
    num_rows = table.shape[0] if rows is None else len(rows)
    step = max(1, _CHUNK_BYTES // (4 * math.prod(table.shape[1:])))
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows)) if rows is None else rows[start : start + step]
        numbers = table.read(part).to(wanted).contiguous()
        yield numbers.view(-1).view(torch.uint8).numpy().data
