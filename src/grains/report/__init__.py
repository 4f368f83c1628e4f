"""The report: results as one HTML page."""
