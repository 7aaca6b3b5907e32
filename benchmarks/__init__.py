"""Programs that measure: each prints a table of ratios, both sides of every ratio measured in the same run."""
