"""Rows as bytes: the safetensors body of a request, and the safetensors head of a reply.

A body is a safetensors file: 8 bytes length, a JSON header, tensors without gaps. What is not a tensor stands in its
`__metadata__`. Tensors of a reply lie at multiples of ALIGNMENT; U8 tensors named `padding.N` fill the gaps, so that
any safetensors reader takes it.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import xxhash
from pydantic import ValidationError

from paceline.errors import DamagedError, WireError
from paceline.schema.layout import ALIGNMENT, ReplyLayout, TensorLayout, layout_bytes
from paceline.schema.parts import WHOLE, Part
from paceline.schema.protocol import MAX_HEADER_BYTES, MAX_PARTS, ReplyHeader
from paceline.schema.rows import RowRequest

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}
_ARRAYS = ("tokens", "documents", "spans", "positions")
_REPLY_KEY = "paceline.reply"
_LENGTH = struct.Struct("<Q")
LENGTH_BYTES = _LENGTH.size


def checksum(*parts: bytes | memoryview) -> str:
    """xxh3-64 of `parts`, one after the other, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def encode_request(request: RowRequest) -> bytes:
    """The body that asks for a row."""
    arrays = {name: getattr(request, name) for name in _ARRAYS}
    metadata = {"position": str(request.position), "spec": request.spec, "row_hash": request.row_hash()}
    if request.part != WHOLE:
        metadata |= {"part": str(request.part.index), "num_parts": str(request.part.count)}
    table: dict[str, Any] = {"__metadata__": metadata}
    parts, offset = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, dtype="<i4").tobytes()
        table[name] = {"dtype": "I32", "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        parts.append(data)
    return b"".join([_head(table), *parts])


def decode_request(body: bytes | memoryview, max_tokens: int) -> RowRequest:
    """The request in a body; its arrays are read-only views of it.

    Raises:
        WireError: no request, or one of more than `max_tokens` tokens; says what is wrong with it.
    """
    table, start = _read_table(body)
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(table) != set(_ARRAYS):
        raise WireError(
            f"a row request has tensors {', '.join(_ARRAYS)} and metadata; this one has {sorted(table)[:8]}"
        )
    arrays = {name: _array(name, table[name], body, start, max_tokens) for name in _ARRAYS}
    for name, num_axes in (("tokens", 1), ("documents", 1), ("spans", 2), ("positions", 2)):
        if arrays[name].ndim != num_axes:
            raise WireError(f"{name} has {arrays[name].ndim} axes, expected {num_axes}")
    try:
        position, spec, row_hash = int(metadata["position"]), str(metadata["spec"]), str(metadata["row_hash"])
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise WireError(f"metadata of a row request holds position, spec and row_hash: {error!r}") from error
    request = RowRequest(
        position=position,
        spec=spec,
        tokens=arrays["tokens"],
        documents=arrays["documents"],
        spans=arrays["spans"],
        positions=arrays["positions"],
        part=_part(metadata),
    )
    if request.row_hash() != row_hash:
        raise WireError(f"row {position} says its hash is {row_hash[:16]}, it is {request.row_hash()}")
    return request


def encode_reply_head(header: ReplyHeader, layout: ReplyLayout) -> bytes:
    """What stands in front of a row's buffer; its length is a multiple of ALIGNMENT."""
    table: dict[str, Any] = {"__metadata__": {_REPLY_KEY: header.model_dump_json()}}
    end = 0
    for number, (name, tensor) in enumerate(layout.items()):
        if tensor.offset > end:
            table[f"padding.{number}"] = _entry("U8", (tensor.offset - end,), end, tensor.offset)
        end = tensor.offset + tensor.num_bytes
        table[name] = _entry(_NAMES[tensor.dtype], tensor.shape, tensor.offset, end)
    if (total := layout_bytes(layout)) > end:
        table["padding.last"] = _entry("U8", (total - end,), end, total)
    return _head(table)


def encode_tensor_head(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands in front of a single tensor's bytes in a safetensors body of its own.

    Args:
        dtype: as TargetInfo spells it, e.g. "bfloat16".
    """
    return _head({name: _entry(_NAMES[dtype], shape, 0, TensorLayout(dtype, shape).num_bytes)})


def head_length(first: bytes | memoryview) -> int:
    """Bytes of JSON that follow the first LENGTH_BYTES of a body.

    Raises:
        DamagedError: no length that a header may have.
    """
    if len(first) != LENGTH_BYTES:
        raise DamagedError(f"a reply of {len(first)} bytes, at least {LENGTH_BYTES} were expected")
    (length,) = _LENGTH.unpack(first)
    if not 0 < length <= MAX_HEADER_BYTES:
        raise DamagedError(f"a reply's header of {length} bytes, at most {MAX_HEADER_BYTES} are expected")
    return int(length)


def decode_reply_head(text: bytes | memoryview) -> ReplyHeader:
    """The header of a reply, from the JSON in front of its tensors.

    Raises:
        DamagedError: it is none.
    """
    try:
        return ReplyHeader.model_validate_json(json.loads(bytes(text))["__metadata__"][_REPLY_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # pydantic's error is a ValueError
        raise DamagedError(f"a reply's header cannot be read: {_short(error)}") from error


def _head(table: dict[str, Any]) -> bytes:
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _read_table(body: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors body, and where its data begins."""
    if len(body) < LENGTH_BYTES:
        raise WireError(f"a body of {len(body)} bytes is no safetensors file")
    (length,) = _LENGTH.unpack_from(body)
    if not 0 < length <= min(MAX_HEADER_BYTES, len(body) - LENGTH_BYTES):
        raise WireError(f"a safetensors header of {length} bytes in a body of {len(body)}")
    try:
        table = json.loads(bytes(body[LENGTH_BYTES : LENGTH_BYTES + length]))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a safetensors header that is not JSON: {_short(error)}") from error
    if not isinstance(table, dict):
        raise WireError("a safetensors header that is no table")
    return table, LENGTH_BYTES + length


def _array(name: str, entry: Any, body: bytes | memoryview, start: int, max_tokens: int) -> np.ndarray:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [begin, end, *shape]
        if dtype != "I32" or any(type(number) is not int or number < 0 for number in numbers) or len(shape) > 2:
            raise WireError(f"{name} is {dtype} {shape}, expected I32 of one or two axes")
        if max(shape, default=0) > max(max_tokens, 3) + 1:
            raise WireError(f"{name} has shape {list(shape)}, this server takes rows of {max_tokens} tokens at most")
        num_items = int(np.prod(shape, dtype=np.int64))
        if end - begin != 4 * num_items or end > len(body) - start:
            raise WireError(f"{name} {list(shape)} lies at bytes {begin} to {end} of {len(body) - start}")
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"{name} has no place in the body: {_short(error)}") from error
    array: np.ndarray = np.frombuffer(body, "<i4", num_items, start + begin).reshape(shape)
    return array


def _part(metadata: dict[str, Any]) -> Part:
    try:
        index, count = int(metadata.get("part", 0)), int(metadata.get("num_parts", 1))
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"part and num_parts of a row request are numbers: {_short(error)}") from error
    if not 0 <= index < count <= MAX_PARTS:
        raise WireError(f"part {index} of {count} is asked for; parts count from 0, and a row has at most {MAX_PARTS}")
    return Part(index, count)


def _short(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
    return f"{type(error).__name__}: {str(error)[:200]}"
