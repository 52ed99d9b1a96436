"""Launching on a Ray cluster: the only folder that imports ray, and only once it is asked for (extra `ray`)."""
