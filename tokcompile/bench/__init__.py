"""What `tokred bench` times."""
