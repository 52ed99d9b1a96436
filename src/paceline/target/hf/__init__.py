"""The transformers engine: any causal language model, in this process, on a thread of its own."""
