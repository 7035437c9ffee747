"""What a user has of the project itself: its versions, the list of what it offers, and a directory to work in."""
