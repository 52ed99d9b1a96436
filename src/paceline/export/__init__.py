"""Published layouts: written, read back, compared."""
