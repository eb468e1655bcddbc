"""The cases: a module here that does not begin with an underscore is one, and holds ``CASE``."""
