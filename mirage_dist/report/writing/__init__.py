"""The report's main table for a terminal and for LaTeX."""
