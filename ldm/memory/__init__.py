"""Memory known beforehand: what a call would take; and weights that are there only while they are used."""
