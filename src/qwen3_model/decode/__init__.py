"""Decoding: an engine takes requests and steps through cycles (engine.py); a cycle's passes are its
strategy's (two_pass.py, one_pass.py)."""
