"""Scores of free texts: metrics, and ratings by a judge."""
