"""The persistent worker pool: its folder, its supervisor, and the client's side of a job."""
