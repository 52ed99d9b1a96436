"""Wires everything: the only place that turns a configuration into objects."""
