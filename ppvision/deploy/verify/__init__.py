"""Whether what was written gives the numbers of the model it came from."""
