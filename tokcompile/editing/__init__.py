"""Token maps, and all that follows an edit."""
