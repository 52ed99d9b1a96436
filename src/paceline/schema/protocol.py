"""The messages of the control plane: what client and server say to each other in JSON, versioned and bounded.

Every request and reply carries its body's xxh3-64 in CHECKSUM_HEADER: what was damaged on the way is told apart from
what was wrong when it was sent.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from paceline.schema.features import FeatureSpec, FinalHidden
from paceline.schema.layout import TensorLayout
from paceline.schema.target_info import TargetInfo

PROTOCOL_VERSION = 2
"""Goes up with any change that an older peer would misunderstand; peers of different versions refuse each other."""

CHECKSUM_HEADER = "paceline-checksum"
"""16 hex digits: xxh3-64 of the whole HTTP body."""
SESSION_KEY_HEADER = "paceline-session-key"
"""The secret of a session, told once when it was opened: nobody else can use or end it."""
MAX_CONTROL_BYTES = 4 << 20
"""Bodies of control calls are refused above this."""
MAX_HEADER_BYTES = 1 << 20
"""The same for the JSON header in front of a row's tensors."""

TransportName = Literal["http", "file", "nccl", "gloo"]
MAX_PARTS = 64
"""Of one row."""
MAX_HALO = 1024

HexDigits = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
GroupKey = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]
FileName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.safetensors$")]
SpecName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Message(BaseModel):
    """Frozen; a key that the protocol does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostFacts(Message):
    """Where a process runs: what decides which transports can work between two."""

    host_id: str = Field(max_length=128)
    """The same for all processes of one host since its start, and for no other."""
    device: str = Field(max_length=64)
    """"cpu" or "cuda"."""
    gpu_uuid: str | None = Field(None, max_length=128)
    """Of the device, where it is a GPU: NCCL refuses two ranks on one."""


class ServerInfo(Message):
    """GET /v1/info. Servers of later versions may say more than this one understands."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    protocol: int
    server_id: HexDigits
    """Drawn when the server started: a server that was started anew is another one."""
    paceline: str
    """The server's version."""
    target: TargetInfo
    host: HostFacts
    transports: tuple[TransportName, ...]
    """What this server can send with."""
    max_row_tokens: int = Field(gt=0)
    """Longer rows are refused."""
    max_document_tokens: int | None = Field(None, gt=0)
    """Rows with longer documents are refused."""
    capture_layers: tuple[int, ...] | None = None
    """What sessions may ask for; None is any layer of the target."""
    lossy: bool = False
    """Several rows share a forward: features depend in the last bits on what else is asked for."""


class SpecMessage(Message):
    """A FeatureSpec."""

    layers: tuple[Annotated[int, Field(ge=0, lt=100_000)], ...] = Field(max_length=1024)
    final_hidden: FinalHidden = "none"
    greedy: bool = False
    logsumexp: bool = False
    halo: int = Field(0, ge=0, le=MAX_HALO)

    def spec(self) -> FeatureSpec:
        """As the rest of the program knows it."""
        return FeatureSpec(self.layers, self.final_hidden, self.greedy, self.logsumexp, self.halo)

    @classmethod
    def of(cls, spec: FeatureSpec) -> SpecMessage:
        """The message for a spec."""
        return cls.model_validate(dataclasses.asdict(spec))


class TransportOffer(Message):
    """One way to send that the client can receive, with what the server needs to know for it."""

    name: TransportName
    parameters: dict[str, str] = Field(default_factory=dict, max_length=16)
    """file: "directory" and "nonce". nccl and gloo: "stall_timeout_s". gloo: "address", the server's as the client
    reaches it."""


class SessionRequest(Message):
    """POST /v1/sessions."""

    protocol: int
    specs: dict[SpecName, SpecMessage] = Field(min_length=1, max_length=16)
    target: TargetInfo | None = None
    """What the client expects to be served; None takes anything."""
    client: HostFacts
    offers: tuple[TransportOffer, ...] = Field(min_length=1, max_length=8)
    """In the order of the client's preference; the server takes the first that works."""
    lease_s: float = Field(gt=0, le=3600)
    label: str = Field("", max_length=128)
    """Who asks, for the server's log: run and rank."""
    group: GroupKey | None = None
    """Secret of a group whose sessions ask for parts of the same rows; without one, rows are asked for whole."""


class SessionReply(Message):
    """What a session is opened with."""

    session: HexDigits
    """Public id, part of the session's paths."""
    key: HexDigits
    """Secret; goes into SESSION_KEY_HEADER."""
    lease_s: float
    """The session ends when it was not renewed and no row was asked for so long."""
    server_id: HexDigits
    transport: TransportName
    parameters: dict[str, str] = Field(default_factory=dict)
    """Of the chosen transport: what the client needs to know for it."""
    refused: dict[str, str] = Field(default_factory=dict)
    """Offers before the chosen one -> why they cannot work."""


StoreKey = Annotated[str, Field(min_length=1, max_length=512)]
StoreValue = Annotated[bytes, Field(max_length=64 << 10)]


class StoreCall(Message):
    """POST /v1/sessions/{id}/store: one step of the rendezvous of a p2p channel. It never waits: a client asks again.

    set: `values` of `keys`. get: their values. add: `number` to the decimal number at the one key. compare_set: at the
    one key, `values[1]` in the place of `values[0]` (empty: of nothing). delete: the one key.
    """

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    op: Literal["set", "get", "add", "compare_set", "delete"]
    keys: tuple[StoreKey, ...] = Field(min_length=1, max_length=64)
    values: tuple[StoreValue, ...] = Field((), max_length=64)
    """URL-safe base64 in JSON."""
    number: int = 0


class StoreReply(Message):
    """What a store call answers."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    values: tuple[StoreValue | None, ...] = ()
    """get: of each key, null where there is none. compare_set: what the key holds now."""
    number: int = 0
    """add: the sum. delete: 1 if there was such a key."""


class TensorEntry(Message):
    """One tensor of a reply and its place."""

    dtype: Literal["float32", "bfloat16", "float16", "int32"]
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=4)
    offset: int = Field(ge=0)

    def layout(self) -> TensorLayout:
        return TensorLayout(self.dtype, self.shape, self.offset)

    @classmethod
    def of(cls, layout: TensorLayout) -> TensorEntry:
        return cls(dtype=layout.dtype, shape=layout.shape, offset=layout.offset)


class ReplyHeader(Message):
    """What a server says about a row's features; the tensors follow in the body, in a file or on a channel."""

    position: int
    row_hash: str = Field(max_length=64)
    num_tokens: int
    """In `hidden`: all of the row, or those of the part."""
    layers: tuple[int, ...]
    part: int = Field(0, ge=0)
    num_parts: int = Field(1, ge=1, le=MAX_PARTS)
    tensors: dict[str, TensorEntry]
    num_bytes: int = Field(ge=0)
    """Of the buffer with all tensors, padding included."""
    finite: bool
    queued_s: float
    computed_s: float
    file: FileName | None = None
    """file: the bare name in the session's directory."""
    file_checksum: HexDigits | None = None
    """file: xxh3-64 of the whole file."""
    channel_epoch: int | None = None
    """nccl, gloo: which communicator the tensors come on; goes up each time it is rebuilt."""
    channel_number: int | None = None
    """nccl, gloo: rows sent on it before this one: receives are posted in this order."""


ErrorKind = Literal[
    "busy",
    "damaged",
    "wrong_request",
    "mismatch",
    "handshake",
    "out_of_memory",
    "engine",
    "unauthorized",
    "unknown_session",
    "not_found",
    "stopping",
]


class ErrorReply(Message):
    """The body of every reply that is not 2xx.

    busy 429 (with Retry-After): later. damaged 400: the body's checksum is wrong, send it again. wrong_request
    400/413: never right. mismatch 422: a row that cannot be right for this target. handshake 409. out_of_memory,
    engine 500: this row failed here. unauthorized 401/403. unknown_session 404: open another. not_found 404.
    stopping 503.
    """

    error: ErrorKind
    message: str
    position: int | None = None
    """The row it is about."""


class RowsAsked(Message):
    """POST /v1/weights/...: the rows that are wanted."""

    rows: list[int] = Field(max_length=4_000_000)
