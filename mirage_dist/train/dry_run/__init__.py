"""`train.dry_run=true`: two steps of the longest samples, a save and a load, and what the whole run will take."""
