"""Needle retrieval tasks, their training documents and their evaluation."""
