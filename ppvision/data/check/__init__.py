"""What is wrong with a data set, said before a training starts."""
