"""Single files in the original layout of CompVis and Stability: what is in them, and how it is read."""
