"""Tests of the page of a whole run."""
