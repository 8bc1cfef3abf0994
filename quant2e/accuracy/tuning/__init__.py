"""Tuning: a goal for the user's metric in, the cheapest mix of precisions that keeps it out, with the trials."""
