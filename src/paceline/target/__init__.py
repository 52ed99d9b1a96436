"""The frozen target: engines that compute features, and admission of rows to them."""
