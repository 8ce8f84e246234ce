"""Tests against a real vLLM server, which lives in an environment of its own."""
