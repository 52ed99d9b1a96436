"""The target server: sessions and rows over HTTP, one engine behind them."""
