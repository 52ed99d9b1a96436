"""A vLLM as it may be one day: a part of its connector that ours is built on takes another argument."""

from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector

_submit_async_write = ExampleHiddenStatesConnector._submit_async_write
ExampleHiddenStatesConnector._submit_async_write = lambda self, pending, stream=None: _submit_async_write(self, pending)

from paceline_vllm_connector import HiddenStatesConnector, changed_parts  # noqa: E402, F401
