"""Where samples come from, in which order they are drawn, and how they reach a rank."""
