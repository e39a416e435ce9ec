"""`orthrus serve`: HTTP and text in one process, the engine in another."""
