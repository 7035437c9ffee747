"""What the kinds of world share: a folder, even draws and spurious first words, records with the traps of real data.

A world is a data set made on first use whose answers an exact judge can rate: `embedded` (gadgets) or `countries`.
"""
