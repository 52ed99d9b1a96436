"""Not SGLang, of which no build runs on a CPU: what paceline uses of it, on transformers' states."""
