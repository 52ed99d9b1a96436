"""One verb per command; heavy imports inside the verb."""
