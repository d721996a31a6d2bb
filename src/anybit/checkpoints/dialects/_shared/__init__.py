"""What several dialects read alike: values of a config, scale grids, stored codes. No dialect's own rule lives here."""
