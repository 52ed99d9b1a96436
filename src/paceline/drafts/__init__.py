"""Draft algorithms: each a folder with its model and its mathematics; shared attention and head losses."""
