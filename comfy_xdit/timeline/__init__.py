"""What each rank of a job did when: Chrome's trace format, and a picture."""
