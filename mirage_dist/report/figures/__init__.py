"""The report's figures. Each function returns a `drawing.Draw`, which draws on given axes in a given palette."""
