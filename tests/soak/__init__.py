"""An index that cannot be broken: each promise as a test, short in the ordinary suite and long behind ``-m soak``."""
