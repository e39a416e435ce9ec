"""What the documentation shows, made anew: `python -m tools.docs.pictures`, `tools.docs.recording`,
`tools.docs.page`, `tools.docs.performance` (make pictures, recording, page-picture, performance)."""
