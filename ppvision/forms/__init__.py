"""The same layers in another order of the same arithmetic: for graphs and for CPU training."""
