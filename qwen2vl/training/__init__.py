"""Training in three stages: what the readers give, how it is packed, and the loop."""
