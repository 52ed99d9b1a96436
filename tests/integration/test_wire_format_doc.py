"""The pages on servers against servers: the client in them works, messages, errors, figures and commands are real."""

from __future__ import annotations

import ast
import json
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError

from forking import Commands
from paceline.client.calls import ServerCalls
from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.drafts.registry import load_algorithm
from paceline.errors import AuthorizationError
from paceline.launch.tokens import take_token
from paceline.schema.features import FeatureSpec, merge_specs
from paceline.schema.layout import reply_bytes
from paceline.schema.protocol import (
    PROTOCOL_VERSION,
    ErrorKind,
    ErrorReply,
    HostFacts,
    ReplyHeader,
    ServerInfo,
    SessionReply,
    SessionRequest,
    SpecMessage,
    StoreCall,
    StoreReply,
)
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.server.answers import refusal_of
from served import Served, ready
from small_engine import small_info
from small_server import connect
from talk import Talk

DOCS = Path(__file__).resolve().parents[2] / "docs"
WIRE = (DOCS / "wire-format.md").read_text(encoding="utf-8")
TRAINING = (DOCS / "disaggregated-training.md").read_text(encoding="utf-8")
MESSAGES: list[type[BaseModel]] = [SessionRequest, SessionReply, ReplyHeader, ErrorReply, StoreCall, StoreReply]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def is_message(kind: type[BaseModel], text: str) -> bool:
    try:
        kind.model_validate_json(text)
    except ValidationError:
        return False
    return True


def test_the_pages_own_client_gets_the_features_that_ours_gets(target_servers: list[Served]) -> None:
    client, example = blocks(WIRE, "python")
    assert "paceline" not in re.findall(r"^(?:import|from) (\w+)", client, flags=re.MULTILINE)
    there: dict[str, Any] = {"URL": target_servers[0].url}
    exec(client + example, there)
    connection = connect(target_servers[1].url)
    try:
        connection.open_session({"training": FeatureSpec((1, 3), "supervised", greedy=True)})
        request = RowRequest(
            position=0,
            spec="training",
            tokens=np.array([5, 6, 7, 8, 9, 10, 11], np.int32),
            documents=np.array([0, 4, 7], np.int32),
            spans=np.array([[2, 4], [5, 7]], np.int32),
            positions=np.array([[0, 1, 2, 3, 0, 1, 2]], np.int32),
        )
        ours = connection.request(request).result(60).take().tensors()
        assert list(there["features"]) == list(ours) == ["hidden", "greedy", "final_hidden", "final_index"]
        for name, tensor in ours.items():
            assert torch.equal(there["features"][name], tensor), name
    finally:
        connection.close()


def test_the_pages_own_client_is_told_what_is_wrong(target_servers: list[Served]) -> None:
    there: dict[str, Any] = {}
    exec(blocks(WIRE, "python")[0], there)
    client = there["Client"](target_servers[0].url)
    with pytest.raises(there["ServerError"], match=r"409 handshake: .*0\.\.3"):
        client.open([99])
    client.open([0])
    with pytest.raises(there["ServerError"], match=r"422 mismatch: .*300 outside"):
        client.row(0, [[300]], [])
    assert client.row(1, [[5]], [])["hidden"].shape == (1, 1, 32)
    client.close()
    with pytest.raises(there["ServerError"], match="404 unknown_session"):
        client.row(2, [[5]], [])


def test_every_json_shown_is_a_message_of_the_protocol() -> None:
    shown = [[kind for kind in MESSAGES if is_message(kind, text)] for text in blocks(WIRE, "json")]
    assert shown == [[kind] for kind in MESSAGES]
    header = ReplyHeader.model_validate_json(blocks(WIRE, "json")[2])
    assert all(entry.offset % 256 == 0 for entry in header.tensors.values())
    assert f"Version {PROTOCOL_VERSION} of the protocol" in WIRE


@pytest.mark.parametrize(
    "kind",
    [ServerInfo, HostFacts, TargetInfo, SpecMessage, SessionRequest, SessionReply, StoreCall, StoreReply, ReplyHeader],
)
def test_every_field_of_a_message_is_explained(kind: type[BaseModel]) -> None:
    assert [name for name in kind.model_fields if f"`{name}`" not in WIRE] == []


def test_every_kind_of_error_is_explained_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d, ]+) \|", section(WIRE, "Errors"), flags=re.MULTILINE))
    assert rows.keys() == set(get_args(ErrorKind))
    assert "500" in rows["engine"]
    assert str(refusal_of(AuthorizationError("who?")).status) in rows["unauthorized"]


def test_every_figure_of_a_server_is_explained(target_servers: list[Served]) -> None:
    text = Talk(target_servers[0].url).ask("GET", "/metrics").body.decode()
    served = {name for name in re.findall(r"^# TYPE (\w+) ", text, flags=re.MULTILINE) if not name.endswith("_created")}
    assert served == set(re.findall(r"^\| `(paceline_\w+)` \|", TRAINING, flags=re.MULTILINE))


def test_every_figure_of_a_step_is_explained() -> None:
    source = (DOCS.parent / "src/paceline/launch/train.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    (table,) = (node for node in ast.walk(functions["_stream_figures"]) if isinstance(node, ast.Dict))
    written = {ast.literal_eval(key) for key in table.keys if key is not None}
    rows = section(TRAINING, "Logs and metrics").partition("field of `stream`")[2].partition("\n\n")[0]
    assert written == {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_bytes_that_travel_are_those_of_the_specs() -> None:
    """36 layers, H = 4096, bfloat16; 8,192 supervised tokens in a row."""
    info = TargetInfo.model_validate(
        small_info().model_dump() | {"num_layers": 36, "hidden_size": 4096, "num_heads": 32, "head_dim": 128}
        | {"dtype": "bfloat16", "mask_token_id": 0}
    )  # fmt: skip
    drafts: dict[str, DraftConfig] = {
        "eagle3": Eagle3Config(algorithm="eagle3"),
        "dflash": DFlashConfig(algorithm="dflash"),
    }
    specs = [load_algorithm(algorithm).feature_spec(draft, info) for algorithm, draft in drafts.items()]
    positions = np.arange(8192, dtype=np.int32)
    rows = {}
    for name, spec in zip(("EAGLE-3", "DFlash", "both in one run"), [*specs, merge_specs(specs)], strict=True):
        sizes = []
        for end in (0, 8192):
            spans = np.array([[0, end]] if end else [], np.int32).reshape(-1, 2)
            request = RowRequest(0, "training", positions, np.array([0, 8192], np.int32), spans, positions[None])
            sizes.append(reply_bytes(request, spec, info))
        per_token = [f"{size // 8192:,}" for size in sizes]
        shown = per_token[0] if sizes[0] == sizes[1] else ", supervised ".join(per_token)
        rows[name] = (len(spec.layers), shown, f"{sizes[1] / 2**20:.1f} MiB")
    for name, (num_layers, shown, size) in rows.items():
        pattern = rf"^\| {name} \| {num_layers}\b[^|]* \| {shown} \| {size} \|$"
        assert re.search(pattern, TRAINING, flags=re.MULTILINE), (name, num_layers, shown, size)


def test_the_commands_for_two_machines_work_on_one(commands: Commands, tiny_target: Path, tmp_path: Path) -> None:
    secrets, serve, look, _ = blocks(section(TRAINING, "Two machines"), "bash")
    here = secrets.replace("gpu1.example", "localhost")
    subprocess.run(["bash", "-euc", here], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    words = shlex.split(serve)[1:]
    changes = {"Qwen/Qwen3-8B": str(tiny_target), "8000": "0", "gpu1.example": "localhost"}
    files = {name: str(tmp_path / name) for name in ("token", "cert.pem", "key.pem")}
    arguments = [(changes | files).get(word, word) for word in words]
    ready_file = tmp_path / "ready.json"
    command = commands.start(*arguments, "--device", "cpu", "--num-threads", "1", "--ready-file", str(ready_file))
    server = ready(command, tmp_path)
    try:
        answered = subprocess.run(
            shlex.split(look.replace("https://gpu1.example:8000", server.url)),
            cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert json.loads(answered.stdout)["status"] == "ok"
        settings = (TransportConfig(), PoolConfig())
        tls_ca, token = str(tmp_path / "cert.pem"), take_token(tmp_path / "token")
        calls = ServerCalls(server.url, *settings, token=token, tls_ca=tls_ca)
        assert calls.info().target.dtype == "bfloat16"
        assert server.url.startswith("https://localhost:")
        stranger = ServerCalls(server.url, *settings, tls_ca=tls_ca)
        with pytest.raises(AuthorizationError, match="asks for its token"):
            stranger.info()
        calls.close()
        stranger.close()
    finally:
        server.kill()
