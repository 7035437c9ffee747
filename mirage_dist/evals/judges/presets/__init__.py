"""Published judges by name: each is a data file here, with its prompt, the form of its replies and its labels.

A new one is one YAML file (`definition.Definition` has its keys), here or anywhere: a recipe may name the file's path.
"""
