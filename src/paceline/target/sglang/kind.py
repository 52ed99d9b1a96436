"""SGLang as one of the engines: `target.engine = "sglang"`."""

from __future__ import annotations

from paceline.target.engines.interface import EngineKind
from paceline.target.sglang.requests import SGLangRequests
from paceline.target.sglang.server import REPLICAS, SHARDING, SPREADING, own_words, sglang_command

SGLANG = EngineKind(
    title="SGLang",
    packages=("sglang",),
    install='pip install "paceline[sglang]" (in a checkout: pip install -e ".[sglang]", without constraints.txt)',
    tried=("0.5.14", "0.5.23"),
    # It is given a directory. Its first request may compile kernels for minutes: ours to say for how many.
    variables={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "SGLANG_WARMUP_TIMEOUT": "86400"},
    spreading=SPREADING,
    sharding=SHARDING,
    step_options=("chunked-prefill-size", "max-prefill-tokens"),
    replica_options=REPLICAS,
    command=sglang_command,
    own_words=own_words,
    shell_command=lambda command, key: f"{command} --api-key {key}",
    connect=SGLangRequests,
)
