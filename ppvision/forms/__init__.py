"""The same layers with the same arithmetic in another order, for graphs and for CPU training."""
