"""Needle retrieval: tasks, training documents, evaluation."""
