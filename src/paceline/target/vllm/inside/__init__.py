"""What runs in vLLM's process: this folder alone is put on its import path."""
