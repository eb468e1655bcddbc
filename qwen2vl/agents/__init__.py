"""What a model says beside prose: boxes, function calls and actions, and the loop that carries actions out."""
