"""Published data: datasets of the hub, the files that recipes expect, and whether they are as published."""
