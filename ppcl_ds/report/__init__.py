"""One page for a whole run: what it has so far, in words and figures, in a file that needs no other."""
