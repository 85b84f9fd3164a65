"""The ready recipes, as data."""
