"""Emulated wide-area links: a user-space TCP proxy that delays and rate-limits by site pair."""
