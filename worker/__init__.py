"""Torch lives here and nowhere else: tuning, scoring, generating, exporting."""
