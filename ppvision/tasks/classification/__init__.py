"""Classification under our engine."""
