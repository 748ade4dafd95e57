"""Answers: sampling them, and their log-probabilities."""
