"""The modules that a program for prediction imports: no exporter, no quanter, no training code."""
