"""What the documentation shows, made anew: `python -m tools.docs.pictures`, `tools.docs.recording`,
`tools.docs.performance` (make pictures, recording, performance)."""
