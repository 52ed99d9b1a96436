"""DFlash (arXiv 2602.06036)."""
