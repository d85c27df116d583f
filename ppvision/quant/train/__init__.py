"""Training for every width at once."""
