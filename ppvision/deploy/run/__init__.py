"""What a program that predicts imports: no exporter, no quanter, no training code."""
