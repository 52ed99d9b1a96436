"""The self-test of engines: known texts through an engine, compared with plain transformers, and a diagnosis."""
