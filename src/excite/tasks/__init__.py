"""One task per file: its loss, its metrics, what it predicts."""
