"""What steers a drawing from inside: areas with their own prompts, and what attention does and shows."""
