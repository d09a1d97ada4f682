"""`txt2img` and `redraw`: flags to requests to files."""
