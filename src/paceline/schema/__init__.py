"""What crosses a process boundary: rows, feature specs, features, target facts. Imports no torch."""
