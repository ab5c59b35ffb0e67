"""Model families: one short declarative file each."""
