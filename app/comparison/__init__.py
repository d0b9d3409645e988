"""The side-by-side of an experiment: scores of answers, and what they add up to."""
