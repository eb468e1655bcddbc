"""What stands in for a download: a checkpoint with random weights, a small tokenizer, drawn media, and the demo."""
