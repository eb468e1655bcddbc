"""The demo: what the embedded model answers beside the truth, and a random checkpoint's path from media to tokens."""
