"""Acceptance length: the serving walk, real speculative decoding, reports."""
