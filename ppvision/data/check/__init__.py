"""Find the problems of a data set before a training starts."""
