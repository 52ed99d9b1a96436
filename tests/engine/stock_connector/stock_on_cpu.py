"""vLLM's own connector on a CPU: its files and its choice of requests, without the pinned memory that a CPU lacks."""

from paceline_vllm_connector import HiddenStatesConnector as OnCPU
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector


class HiddenStatesConnector(OnCPU):
    def _write_tensors(self, *given: object) -> None:
        ExampleHiddenStatesConnector._write_tensors(*given)

    def build_connector_meta(self, scheduler_output: object) -> object:
        return ExampleHiddenStatesConnector.build_connector_meta(self, scheduler_output)
