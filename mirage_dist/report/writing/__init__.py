"""The report's tables as Markdown and CSV, for a terminal and for LaTeX."""
