"""The `vllm` engine: a vLLM server computes a row's documents as requests of their own."""
