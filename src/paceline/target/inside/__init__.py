"""What runs in an engine's process: this folder alone is put on its import path."""
