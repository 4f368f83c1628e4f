"""The experiment: what steering gains on held-out questions, and what it costs."""
