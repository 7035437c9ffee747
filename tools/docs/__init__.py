"""What the documentation site has beside the pages of docs/: reference pages, made from the code at its build.

Nothing of it is needed to use the package. It reads sources and imports neither torch nor transformers.
"""
