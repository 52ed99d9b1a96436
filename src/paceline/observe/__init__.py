"""What a run says about itself: logs per role and rank, metrics, spans. Takes numbers, not tensors."""
