"""The trainer's side of features: connections, the pool, the ordered stream."""
