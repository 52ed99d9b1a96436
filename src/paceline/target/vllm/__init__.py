"""The `vllm` engine: a vLLM server, unpatched, computes a row's documents as requests of their own."""
