"""`mirage paper`: one published table from published data, as a chain of recipes: checked, planned, resumed."""
