"""What a user sees, in a terminal and as files."""
