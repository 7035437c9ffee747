"""Published judges by name: each is a data file of this folder, with its prompt, the form of its replies and its labels.

A new one is one YAML file here (`definition.Definition` has its keys), or anywhere: a recipe may name the file's path.
"""
