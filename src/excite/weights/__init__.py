"""Published weights into our networks: one file per format."""
