"""Agreement and failure across the ranks of a job."""
