"""Engines in processes of their own that compute one document a request: what they have in common."""
