"""``qwen2vl web``: a page to try a checkpoint on, served to browsers on this machine."""
